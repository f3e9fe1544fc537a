"""How stages find their inputs in a workspace."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.gguf_file import SUFFIX
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.artifacts import check_file, input_artifact
from nemo_minitron.workspace.build import building
from nemo_minitron.workspace.layout import Workspace, model_in
from nemo_minitron.workspace.manifest import Input, digest
from nemo_minitron.workspace.typed_json import read_json

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.checkpoint import Checkpoint
    from nemo_minitron.families import Architecture
    from nemo_minitron.pruning.layer_times import LayerTimes


@dataclass(frozen=True)
class Source:
    """Contents of ``teacher/source.json``.

    Attributes:
        path: where the model lies; relative to the workspace where it is inside.
        given: what the user called it.
        revision: its commit, where it is of the hub.
        asked: the revision that was asked for.
        stored_as: what its weights are quantised to, or that they lie in GGUF files; empty: neither.
    """

    path: str
    given: str
    revision: str | None
    asked: str | None = None
    stored_as: str = ""


def read_source(workspace: Workspace) -> Source:
    """Where the source model lies.

    Raises:
        ValueError: the file is damaged, or no longer what ``download`` wrote.
    """
    check_file(workspace.source)
    source: Source = read_json(workspace.source, Source)
    return source


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
    return workspace.root / read_source(workspace).path, item  # an absolute path stays as it is


def is_gguf_file(path: Path) -> bool:
    """Whether what the user names as a model is a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def gguf_folder(file: Path, workspace: Workspace) -> Path:
    """The folder of the model in a GGUF file, made once in the workspace; its weights stay in the file.

    Raises:
        ValueError: see ``write_gguf_folder``.
    """
    state = file.stat()
    stamp = digest(["gguf", str(file.resolve()), state.st_size, state.st_mtime_ns])[:12]
    folder = workspace.unpacked_model(stamp)
    if not folder.is_dir():
        from nemo_minitron.models.gguf_folder import write_gguf_folder

        with building(folder) as temporary:
            write_gguf_folder(file, temporary)
    return folder


def model_folder(config: Config, where: str, text: str) -> tuple[Path, Input]:
    """A model that the user names beside the source: its folder, or that of a GGUF file.

    Args:
        config: the whole configuration.
        where: the key that names it.
        text: what it says.

    Raises:
        ValueError: there is none.
    """
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    folder = Path(text).expanduser()
    if is_gguf_file(folder):
        folder = gguf_folder(folder, Workspace(workspace_of(config)))
    if folder.is_file():
        raise ValueError(f"{where}: expected a folder, or a GGUF file, found a file: {folder}")
    if not folder.is_dir():
        raise ValueError(f"{where}: no such folder: {folder}")
    return folder, Input(str(folder), open_checkpoint(folder).fingerprint)


def refuse_gguf(config: Config, checkpoint: "Checkpoint", source: Path | None = None) -> None:
    """Refuses ``export.gguf`` of a model that is not written as GGUF, before anything is trained.

    Args:
        config: the whole configuration.
        checkpoint: the model.
        source: the model that it was made of; None: it is one itself.

    Raises:
        ValueError: its family or its tokenizer is not.
    """
    if config.export.gguf:
        from nemo_minitron.release.gguf_export import check_gguf

        check_gguf(checkpoint, config.export.gguf, config.export.gguf_pre, source)


POSITIONS = "max_position_embeddings"
"""Key of config.json: how many positions a model was made for."""


def length_notes(config: Config, hf_config: Mapping[str, Any], *texts: str) -> tuple[str, ...]:
    """A note for each text whose samples are longer than a model was made for.

    Args:
        config: the whole configuration.
        hf_config: the model's config.json.
        texts: parts of ``data`` that the model reads.
    """
    most = hf_config[POSITIONS] if POSITIONS in hf_config else None
    lengths = {text: getattr(config.data, text).sequence_length for text in texts}
    return tuple(
        f"data.{text}.sequence_length: {length:,} tokens, and the model was made for {most:,} positions "
        f"({POSITIONS} in its config.json); what it computes beyond them may mean little"
        for text, length in lengths.items()
        if isinstance(most, int) and length > most
    )


def times_of(config: Config, model: "Architecture") -> tuple["LayerTimes", Input]:
    """The table that bounds of time are counted by: ``plan.budget.layer_times``, or that of the workspace.

    Raises:
        ValueError: there is none, or it is of another model or another pass.
    """
    from nemo_minitron.pruning.layer_times import FILE, latency_of, read_layer_times

    budget, workspace = config.plan.budget, Workspace(workspace_of(config))
    if budget.layer_times is None:
        item = input_artifact(workspace.root, "layer_times", "measure-layers")
        path = workspace.layer_times / FILE
        check_file(path)
    else:
        path = Path(budget.layer_times).expanduser()
        path = path / FILE if path.is_dir() else path
    times = read_layer_times(path)
    if budget.layer_times is not None:
        item = Input(str(path), digest(asdict(times)))
    latency_of(times, model)
    for key in ("dtype", "phase", "batch", "context"):
        asked, found = getattr(budget, key), getattr(times, key)
        if asked != found:
            raise ValueError(
                f"{plain(path)}: its times are of {key}={found}, and plan.budget.{key} is {asked}; run "
                "'minitron measure-layers' with the same"
            )
    return times, item


def distillation_teacher(config: Config) -> tuple[Path, Input]:
    """The model that the student learns from: ``distill.teacher``, or the one that was pruned."""
    if config.distill.teacher is None:
        return teacher_folder(config)
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    folder = Path(config.distill.teacher)
    if is_gguf_file(folder):
        folder = gguf_folder(folder, Workspace(workspace_of(config)))
    return folder, Input(str(folder), open_checkpoint(folder).fingerprint)
