"""Making an artifact in a temporary neighbour that takes its place."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nemo_minitron.workspace.atomic import discard, replacing_folder
from nemo_minitron.workspace.condition import condition
from nemo_minitron.workspace.layout import ASIDE, STATE, manifest_in, state_in
from nemo_minitron.workspace.manifest import NAME, Input, fingerprint, now, write_manifest

__all__ = ["STATE", "building", "discard", "make", "refuse_unknown_folder", "set_aside"]

STAMP = "recipe.json"
"""In the state of an artifact in the making: by which recipe it was begun."""


def building(target: Path) -> AbstractContextManager[Path]:
    """A temporary folder that takes ``target``'s place when the block ends well, and vanishes when not.

    Leftovers of a killed run are cleared first. The caller writes the manifest inside the block; it
    tells a file that a machine which stopped has cut short, so that weights are not forced to the
    disk here.
    """
    return replacing_folder(target, sync=False)


def refuse_unknown_folder(folder: Path) -> None:
    """Refuses to put an artifact in the place of what is none.

    Raises:
        ValueError: a file is there, or a folder that holds something that no stage made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder.resolve()}: expected a folder that this package makes, found a file; it is not "
            "overwritten: move it, or choose another workspace"
        )
    state = state_in(folder)
    # without a recipe it is what a run left that was killed as it began
    begun = (state / STAMP).exists() or (state.is_dir() and not any(state.glob("[!.]*")))
    known = manifest_in(folder).exists() or begun or set_aside(folder)
    if folder.is_dir() and any(folder.iterdir()) and not known:
        raise ValueError(
            f"{folder.resolve()}: exists, and was not made by this package (no {NAME}); it is not "
            "overwritten: move it, or choose another workspace"
        )


def make(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Sequence[Input],
    build: Callable[[Path], Mapping[str, str] | None],
) -> bool:
    """Builds an artifact unless it is there already.

    Args:
        folder: where it belongs.
        kind: what it is.
        config: the part of the configuration that decides its contents.
        inputs: what it is made from.
        build: fills a temporary folder; may return hashes that it knows, by file name.

    Returns:
        Whether it had to be built.
    """
    if condition(folder, fingerprint(kind, config, inputs), inputs).state == "done":
        return False
    refuse_unknown_folder(folder)
    started = now()
    with building(folder) as temporary:
        known = build(temporary)
        write_manifest(temporary, kind, config, inputs, started, known)
    return True


def set_aside(folder: Path) -> list[Path]:
    """What an artifact's makings by other recipes left: their states, or whole, with a manifest."""
    return sorted(folder.glob(f"{ASIDE}*"))
