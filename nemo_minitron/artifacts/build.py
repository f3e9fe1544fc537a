"""Making an artifact: in a temporary neighbour that takes its place, or in place where it can be resumed."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.manifest import (
    NAME,
    Input,
    digest,
    fingerprint,
    is_done,
    now,
    write_json,
    write_manifest,
)

STATE = "state"
"""Sub-folder of an artifact in the making that survives interruption: what a training resumes from."""


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


def refuse_foreign(folder: Path) -> None:
    """Refuses to put an artifact in the place of what is none.

    Raises:
        ValueError: the folder is there, and holds something that no stage made.
    """
    ours = (NAME, STATE)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in ours):
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
    refuse_foreign(folder)
    started = now()
    with building(folder) as temporary:
        known = build(temporary)
        write_manifest(temporary, kind, config, inputs, started, known)
    return True


def make_resumable(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Sequence[Input],
    build: Callable[[Path, Path], None],
) -> bool:
    """Builds an artifact that takes long, in place, so that a killed run goes on where it was.

    Args:
        folder: where it belongs; has no manifest until it is complete.
        kind: what it is.
        config: the part of the configuration that decides its contents.
        inputs: what it is made from.
        build: gets the state folder, as an earlier run with the same recipe left it, and an empty folder
            whose contents become the artifact.

    Returns:
        Whether it had to be built.
    """
    expected = fingerprint(kind, config, inputs)
    if is_done(folder, expected, inputs):
        return False
    refuse_foreign(folder)
    started = now()
    state = folder / STATE
    recipe = digest([expected, [item.finished for item in inputs]])
    stamp = state / "recipe.json"
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != recipe:
        discard(folder)
        state.mkdir(parents=True)
        write_json(stamp, recipe)
    with building(folder / "result") as temporary:
        build(state, temporary)
    for child in (folder / "result").iterdir():
        discard(folder / child.name) if child.is_dir() else None
        child.replace(folder / child.name)
    discard(folder / "result")
    write_manifest(folder, kind, config, inputs, started, without=(STATE,))
    discard(state)
    return True
