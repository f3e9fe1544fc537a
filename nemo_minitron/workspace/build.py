"""Making an artifact in a temporary neighbour that takes its place."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.workspace.manifest import ASIDE, NAME, Input, fingerprint, is_done, now, write_manifest

STATE = "state"
"""Sub-folder of an artifact in the making that survives interruption: what a training resumes from."""
STAMP = "recipe.json"
"""In it: by which recipe it was begun."""


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder that takes ``target``'s place when the block ends well, and vanishes when not.

    Leftovers of a killed run are cleared first. The caller writes the manifest inside the block.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    discard(temporary)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        discard(temporary)
        raise
    discard(target)
    temporary.rename(target)


def discard(folder: Path) -> None:
    """Removes a folder; it goes out of the way first, so that a part of it is never taken for the whole."""
    aside = folder.with_name(f".{folder.name}.old.partial")
    if aside.exists():  # of a removal that was killed
        shutil.rmtree(aside)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


def refuse_unknown_folder(folder: Path) -> None:
    """Refuses to put an artifact in the place of what is none.

    Raises:
        ValueError: the folder is there, and holds something that no stage made.
    """
    state = folder / STATE
    # without a recipe it is what a run left that was killed as it began
    begun = (state / STAMP).exists() or (state.is_dir() and not any(state.glob("[!.]*")))
    known = (folder / NAME).exists() or begun or set_aside(folder)
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
    if is_done(folder, fingerprint(kind, config, inputs), inputs):
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
