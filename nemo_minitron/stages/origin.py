"""What a workspace's source was made of by others: of a cascade's steps, the model that all began with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.evaluation.gate import LINEAGE
from nemo_minitron.stages.inputs import Source, read_source, source_folder
from nemo_minitron.workspace.layout import Workspace, model_in
from nemo_minitron.workspace.manifest import read_manifest
from nemo_minitron.workspace.typed_json import read_json


@dataclass(frozen=True)
class Origin:
    """A source, as the workspace that it is of tells of it.

    Attributes:
        workspace: that workspace.
        pointer: what its ``download`` wrote.
        folder: where the source lies.
        cuts: how many exports were cut from it, one from the other, before the source asked for.
    """

    workspace: Workspace
    pointer: Source
    folder: Path
    cuts: int = 0

    @property
    def name(self) -> str:
        """What the user calls it; a model that a run has trained itself is called like its workspace."""
        if self.folder == model_in(self.workspace.pretrain):
            return self.workspace.root.resolve().name
        return Path(self.pointer.given).name


class _Made(TypedDict):
    kind: str
    fingerprint: str


class _Lineage(TypedDict):
    stages: list[_Made]


def origin_of(workspace: Workspace) -> Origin:
    """The model that a workspace's source comes from in the end, through corrections and exports.

    Raises:
        ValueError: the workspace's own pointer is damaged.
    """
    return list(_back(workspace))[-1]


def uncorrected(config: Config) -> Path:
    """The model that a run's source is the correction of; the source itself where it is of none.

    Its dtypes, its tokenizer and what lies around it are an export's. It is what one cut with
    correction has as its source.

    Raises:
        ValueError: ``download`` has not been run yet, or what it made is damaged.
    """
    source_folder(config)
    workspace = Workspace(workspace_of(config))
    return [found.folder for found in _back(workspace) if found.cuts == 0][-1]


def is_corrected(config: Config, folder: Path) -> bool:
    """Whether a folder holds what a run, or the cascade that it is a step of, trained its source to."""
    workspace = Workspace(workspace_of(config))
    places = [workspace, *_cascade(workspace)]
    return folder.resolve() in [model_in(place.correct).resolve() for place in places]


def _back(workspace: Workspace) -> Iterator[Origin]:
    """A workspace's source, and what it was made of, one after the other."""
    pointer = read_source(workspace)
    found: Origin | None = Origin(workspace, pointer, workspace.root / pointer.path)
    seen = set()
    while found is not None and found.workspace.root.resolve() not in seen:
        seen.add(found.workspace.root.resolve())
        yield found
        found = _before(found)


def _before(found: Origin) -> Origin | None:
    """What a source was made of, by the workspace that made it; None: by none."""
    if found.pointer.revision is not None:  # of the hub
        return None
    folder = found.folder.resolve()
    cascade = _cascade(found.workspace)
    for workspace in (*cascade, Workspace(folder.parent), Workspace(folder.parent.parent)):
        try:
            pointer = read_source(workspace)
            own = workspace.root / pointer.path
            if not own.is_dir():
                continue
            if folder == own.resolve() and workspace in cascade:  # a step names it by its place
                return Origin(workspace, pointer, own, found.cuts)
            if folder == model_in(workspace.correct).resolve() and _corrects(workspace):
                return Origin(workspace, pointer, own, found.cuts)
            if folder == workspace.export.resolve() and _exports(workspace):
                return Origin(workspace, pointer, own, found.cuts + 1)
        except (
            OSError,
            ValueError,
        ):  # no workspace, whatever its files are called, or a damaged one
            continue
    return None


def _cascade(workspace: Workspace) -> list[Workspace]:
    """The cascade's workspace that one is a step in, where it is one."""
    root = workspace.root.resolve()
    around = Workspace(root.parent.parent)
    return [around] if around.step(root.name).root == root else []


def _corrects(workspace: Workspace) -> bool:
    """Whether the corrected model was made from the source that the workspace has now."""
    corrected, teacher = read_manifest(workspace.correct), read_manifest(workspace.teacher)
    known = () if corrected is None else corrected.inputs
    return teacher is not None and teacher.fingerprint in [item.fingerprint for item in known]


def _exports(workspace: Workspace) -> bool:
    """Whether the export comes from the source that the workspace has now."""
    teacher, path = read_manifest(workspace.teacher), workspace.export / LINEAGE
    made: list[_Made] = read_json(path, _Lineage)["stages"] if path.is_file() else []
    return teacher is not None and {"kind": "teacher", "fingerprint": teacher.fingerprint} in [
        {"kind": stage["kind"], "fingerprint": stage["fingerprint"]} for stage in made
    ]
