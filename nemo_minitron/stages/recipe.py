"""What a stage gives to be run: how its artifact is made, and how it is summarised."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.workspace.manifest import Input

if TYPE_CHECKING:
    from nemo_minitron.models.ranks import Ranks


@dataclass(frozen=True)
class Summary:
    """A summary of a finished artifact; the attributes are those of ``Result``."""

    headline: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Recipe:
    """An artifact that a stage makes unless it is there; ``stages.run`` makes it, with the ranks of torchrun.

    Attributes:
        folder: where it belongs.
        kind: what it is.
        settings: the part of the configuration that decides its contents.
        inputs: what it is made from.
        build: makes it; called on every rank, with the state folder (as an earlier run with this
            recipe left it, where the artifact is resumable), an empty folder whose contents become
            the artifact, and the ranks. Only rank 0 fills that folder; it may return hashes that it
            knows, by file name.
        summary: describes the artifact; called on rank 0, once it exists.
        check: called on rank 0 where the artifact is due, before what lies in its place gives way.
        resumable: whether it is built in place, so that a killed run resumes where it was.
        keep: whether a finished one of another recipe is set aside, too, and comes back with that
            recipe.
    """

    folder: Path
    kind: str
    settings: Mapping[str, Any]
    inputs: Sequence[Input]
    build: "Callable[[Path, Path, Ranks], Mapping[str, str] | None]"
    summary: Callable[[], Summary]
    check: Callable[[], None] = _nothing
    resumable: bool = False
    keep: bool = False
