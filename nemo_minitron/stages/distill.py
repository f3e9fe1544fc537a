"""distill: the pruned model learns from the teacher's logits ([P1] section 3)."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.checkpoint import open_checkpoint, read_config, tokenizer_fingerprint
from nemo_minitron.artifacts.manifest import Input
from nemo_minitron.artifacts.plan import read_plan
from nemo_minitron.artifacts.workspace import input_artifact
from nemo_minitron.core.divergences import Divergence
from nemo_minitron.core.intermediate import IntermediateWeights
from nemo_minitron.stages.config import Config
from nemo_minitron.stages.fitting import Role, last_losses, tokenizer_of, train_into, training_inputs
from nemo_minitron.stages.stage import Result, teacher_folder, workspace_of
from nemo_minitron.stages.training_config import DistillConfig, IntermediateConfig


def run(config: Config) -> Result:
    """Trains the pruned model against the teacher.

    Raises:
        ValueError: the teacher has another vocabulary or tokenizer, or a setting is out of range.
    """
    workspace = workspace_of(config)
    settings = config.distill
    divergence = _divergence(settings)
    inside = _intermediate(settings.intermediate)
    if settings.kl < 0 or settings.ce < 0 or settings.kl + settings.ce == 0:
        raise ValueError(
            f"distill: kl and ce must not be negative, nor both 0, found {settings.kl} and {settings.ce}"
        )
    pruned = workspace / "pruned"
    teacher, teacher_input = _teacher(config)
    inputs = [input_artifact(workspace, "pruned", "prune"), teacher_input, *training_inputs(config)]
    vocabulary = _vocabulary(teacher, pruned)

    def start() -> tuple[Any, dict[str, Any], Path]:
        import torch

        from nemo_minitron.bridge.models import load_model

        return load_model(pruned, dtype=torch.float32), read_config(pruned), pruned

    def callbacks() -> list[Any]:
        """The callback that distils, with the teacher in memory."""
        from nemo_minitron.bridge.models import load_model
        from nemo_minitron.core.losses import LossWeights
        from nemo_minitron.families import family_of
        from nemo_minitron.plugin.distillation import KnowledgeDistillation

        weights = LossWeights(settings.kl, settings.ce, divergence)
        family = family_of(read_config(teacher))
        model = load_model(teacher)
        kept_H = _kept(config) if inside is not None and settings.teacher is None else None
        return [
            KnowledgeDistillation(model, family, weights, settings.chunk_tokens, vocabulary, inside, kept_H)
        ]

    section = {**asdict(settings), "teacher": None, "trainer": {}, "optim": {}}
    folder = workspace / "student"
    role = Role(lambda: tokenizer_of(pruned), start, callbacks)
    made = train_into(folder, "student", config, section, inputs, role)
    return Result("distill", folder, made, last_losses(folder))


def _teacher(config: Config) -> tuple[Path, Input]:
    if config.distill.teacher is None:
        return teacher_folder(config)
    folder = Path(config.distill.teacher)
    return folder, Input(str(folder), open_checkpoint(folder).fingerprint)


def _divergence(settings: DistillConfig) -> Divergence:
    try:
        return Divergence(settings.divergence, settings.temperature, settings.beta, settings.top_k)
    except ValueError as error:
        raise ValueError(f"distill.{error}") from error


def _intermediate(settings: IntermediateConfig) -> IntermediateWeights | None:
    """The losses on hidden states, where there are some."""
    if not settings.terms:
        return None
    where = "distill.intermediate"
    pairs = []
    for text in settings.layers:
        pair = re.fullmatch(r"\s*(-?\d+)\s*:\s*(-?\d+)\s*", text)
        if pair is None:
            raise ValueError(f"{where}.layers: expected TEACHER:STUDENT, as in -3:-3, found {text!r}")
        pairs.append((int(pair[1]), int(pair[2])))
    try:
        return IntermediateWeights(
            tuple(settings.terms), settings.distance, tuple(pairs), settings.relation_heads, settings.alpha
        )
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _kept(config: Config) -> Any:
    """The teacher's channel that each channel of the student was; None where none was cut."""
    keep = read_plan(workspace_of(config) / "plan").keep
    return keep["hidden"] if "hidden" in keep else None


def _vocabulary(teacher: Path, pruned: Path) -> int | None:
    """Entries of both vocabularies that count, where they are padded to different sizes; None: all.

    Teacher and student must speak of the same tokens: their tokenizers' files are compared.
    """
    from nemo_minitron.bridge.models import load_tokenizer

    ours, theirs = read_config(pruned)["vocab_size"], read_config(teacher)["vocab_size"]
    if ours == theirs and tokenizer_fingerprint(teacher) == tokenizer_fingerprint(pruned):
        return None
    entries = load_tokenizer(pruned).get_vocab()
    if load_tokenizer(teacher).get_vocab() != entries:
        raise ValueError(
            f"distill.teacher: {teacher} gives its token ids other meanings than the pruned model's tokenizer"
        )
    return None if ours == theirs else max(entries.values()) + 1
