"""download: the model to compress, checked and pointed at; a local folder is never copied."""

import os
from dataclasses import asdict
from pathlib import Path

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.set_aside import notes
from nemo_minitron.checkpoints.side_files import TOKENIZER_FILES, left_behind
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.stages.inputs import (
    Source,
    gguf_folder,
    is_gguf_file,
    read_source,
    refuse_gguf,
)
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.workspace.build import building
from nemo_minitron.workspace.layout import Workspace, model_in
from nemo_minitron.workspace.manifest import Input, digest, read_manifest, write_json


def recipe(config: Config) -> Recipe:
    """Finds the source model, fetches it where it is on the hub, and checks it against its family's table.

    Raises:
        ValueError: no such model, or one that cannot be pruned; the message says why.
    """
    workspace = Workspace(workspace_of(config))
    folder, revision, given = _locate(config, workspace)
    checkpoint = _opened(folder, revision)
    inside = folder.is_relative_to(workspace.root)
    inputs = [Input(given, checkpoint.fingerprint, _finished(folder.parent) if inside else None)]
    # a folder of the workspace is pointed at from inside it, so that the workspace can move
    pointer = os.path.relpath(folder, workspace.root) if inside else str(folder.resolve())
    settings = {"revision": revision}
    stored_as = {"stored_as": checkpoint.stored_as} if checkpoint.stored_as else {}
    settings |= stored_as
    refuse_gguf(config, checkpoint)

    def build(_state: Path, target: Path, _ranks: Ranks) -> None:
        """Checks what was fetched, and writes the pointer."""
        if revision is not None:
            from nemo_minitron.release.hub_download import check_hashes

            check_hashes(folder)
        from nemo_minitron.release.dry_run import check_builds, check_whole

        check_builds(folder, checkpoint.architecture)
        if checkpoint.around is not None:
            check_whole(checkpoint)
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            from nemo_minitron.models.causal_lm import load_tokenizer

            load_tokenizer(folder)
        _try(checkpoint)
        source = asdict(Source(pointer, given, revision, config.source.revision))
        del source["stored_as"]
        write_json(target / workspace.source.name, {**source, **stored_as})

    def summary() -> Summary:
        found = [*notes(folder, checkpoint.config)]
        found += [f"{name}: not carried along" for name in left_behind(folder)]
        return Summary(_headline(checkpoint), notes=tuple(found))

    return Recipe(workspace.teacher, "teacher", settings, inputs, build, summary)


def _try(checkpoint: Checkpoint) -> None:
    """Tries what an export must be able to do, where a model of these settings is made quickly."""
    from nemo_minitron.release.dry_run import LARGEST, smallest, try_export

    if model_size(smallest(checkpoint.architecture)).parameters <= LARGEST:
        try_export(checkpoint.folder, checkpoint.architecture)


def _locate(config: Config, workspace: Workspace) -> tuple[Path, str | None, str]:
    """Folder, pinned revision, and what the user called the model."""
    name = config.source.model
    if name is None and config.pretrain.enabled:
        return model_in(workspace.pretrain), None, "pretrain/hf"
    if name is None:
        raise ValueError("source.model: no model given; name a local folder or a hub id")
    local = Path(name).expanduser()
    if local.suffix == ".nemo" and local.is_file():
        return _unpacked(local, workspace), None, name
    if is_gguf_file(local):
        return gguf_folder(local, workspace), None, name
    if local.exists() or name.startswith((".", "/", "~")):
        return local, None, name
    from nemo_minitron.release.hub_download import download

    asked = config.source.revision
    folder, commit = download(name, _pinned(workspace, name, asked) or asked)
    return folder, commit, name


def _pinned(workspace: Workspace, name: str, asked: str | None) -> str | None:
    """The commit that this workspace began with: what is pushed to the hub later begins no other run."""
    try:
        source = read_source(workspace)
    except OSError:  # none yet
        return None
    return source.revision if (source.given, source.asked) == (name, asked) else None


def _opened(folder: Path, revision: str | None) -> Checkpoint:
    """The checkpoint; what the hub's cache holds of it damaged is thrown out, to be fetched again.

    Raises:
        ValueError: it is none of a known family.
        ConnectionError: a file had arrived damaged.
    """
    try:
        return open_checkpoint(folder)
    except ValueError:
        if revision is not None:
            from nemo_minitron.release.hub_download import check_hashes

            check_hashes(folder)
        raise


def _unpacked(archive: Path, workspace: Workspace) -> Path:
    """The Hugging Face folder of a .nemo archive that this package wrote, made once in the workspace.

    NeMo reads its weights with torch's ``weights_only``: nothing in it is run.
    """
    state = archive.stat()
    stamp = digest([str(archive.resolve()), state.st_size, state.st_mtime_ns])[:12]
    folder = workspace.unpacked_model(stamp)
    if not folder.is_dir():
        from nemo_minitron.plugin.model import MinitronModel
        from nemo_minitron.plugin.nemo_archive import check_archive

        check_archive(archive)
        with building(folder) as temporary:
            MinitronModel.restore_from(str(archive), map_location="cpu").save_hf(temporary)
    return folder


def _finished(folder: Path) -> str | None:
    manifest = read_manifest(folder)
    return None if manifest is None else manifest.finished


def _headline(checkpoint: Checkpoint) -> str:
    size = model_size(checkpoint.architecture)
    stored = f" ({checkpoint.stored_as})" if checkpoint.stored_as else ""
    around = checkpoint.around
    inside = "" if around is None else f" inside {around.wrapper.model_type}"
    return (
        f"{checkpoint.family.model_type}{inside}, {size.parameters:,} parameters, from "
        f"{checkpoint.folder}{stored}"
    )
