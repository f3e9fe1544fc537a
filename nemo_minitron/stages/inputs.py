"""How stages find their inputs in a workspace."""

import json
from pathlib import Path

from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace, model_in
from nemo_minitron.workspace.manifest import Input


def teacher_folder(config: Config) -> tuple[Path, Input]:
    """The model that is scored, pruned and distilled from: the corrected teacher where correction is on.

    Raises:
        ValueError: it has not been made yet.
    """
    workspace = Workspace(workspace_of(config))
    if config.correct.enabled:
        return model_in(workspace.correct), input_artifact(workspace.root, "correct", "correct")
    return source_folder(config)


def source_folder(config: Config) -> tuple[Path, Input]:
    """The model that ``download`` points at.

    Raises:
        ValueError: it has not been made yet.
    """
    workspace = Workspace(workspace_of(config))
    item = input_artifact(workspace.root, "teacher", "download")
    pointer = json.loads(workspace.source.read_text(encoding="utf-8"))
    return workspace.root / pointer["path"], item  # an absolute path stays as it is


def distillation_teacher(config: Config) -> tuple[Path, Input]:
    """The model that the student learns from: ``distill.teacher``, or the one that was pruned."""
    if config.distill.teacher is None:
        return teacher_folder(config)
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    folder = Path(config.distill.teacher)
    return folder, Input(str(folder), open_checkpoint(folder).fingerprint)


def shared_vocabulary(teacher: Path, student: Path) -> int | None:
    """Entries of both vocabularies that count, where they are padded to different sizes; None: all.

    Teacher and student must speak of the same tokens: their tokenizers' files are compared.

    Raises:
        ValueError: they do not.
    """
    from nemo_minitron.checkpoints.hf_config import read_config
    from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
    from nemo_minitron.models.causal_lm import load_tokenizer

    ours, theirs = read_config(student)["vocab_size"], read_config(teacher)["vocab_size"]
    if ours == theirs and tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student):
        return None
    entries = load_tokenizer(student).get_vocab()
    if load_tokenizer(teacher).get_vocab() != entries:
        raise ValueError(
            f"distill.teacher: {teacher} gives its token ids other meanings than the pruned model's tokenizer"
        )
    return None if ours == theirs else max(entries.values()) + 1
