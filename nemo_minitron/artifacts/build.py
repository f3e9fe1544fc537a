"""Making an artifact: in a temporary neighbour that takes its place, or in place where it can be resumed."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.manifest import (
    ASIDE,
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
    known = any((folder / name).exists() for name in (NAME, STATE)) or set_aside(folder)
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
    state = _state_for(folder, {"recipe": digest([expected, [item.finished for item in inputs]]), **config})
    with building(folder / "result") as temporary:
        build(state, temporary)
    for child in (folder / "result").iterdir():
        discard(folder / child.name) if child.is_dir() else None
        child.replace(folder / child.name)
    discard(folder / "result")
    write_manifest(
        folder, kind, config, inputs, started, without=(STATE, *(x.name for x in set_aside(folder)))
    )
    discard(state)
    return True


def set_aside(folder: Path) -> list[Path]:
    """What an artifact's earlier, unfinished makings by other recipes left behind."""
    return sorted(folder.glob(f"{ASIDE}*"))


def _state_for(folder: Path, recipe: dict[str, Any]) -> Path:
    """The state folder of a recipe: as it was left, or a new one.

    Another recipe's work goes out of the way, never away: it may have taken weeks. Whoever comes back to that
    recipe finds it again.
    """
    state, stamp = folder / STATE, folder / STATE / "recipe.json"
    found = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    found = {"recipe": found} if isinstance(found, str) else found  # of version 0.1
    if found.get("recipe") == recipe["recipe"]:
        return state
    if found and any(child != stamp for child in state.iterdir()):
        aside = _aside(folder, found)
        state.rename(aside)
        print(
            f"{folder.name}: begun with other settings ({_changes(found, recipe)}); that work is kept in "
            f"{aside}, and goes on where those come back; minitron clean removes it",
            file=sys.stderr,
        )
    kept = set_aside(folder)
    (folder / NAME).unlink(missing_ok=True)
    for child in folder.iterdir() if folder.is_dir() else ():
        if child not in kept:
            discard(child) if child.is_dir() else child.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if _aside(folder, recipe) in kept:
        _aside(folder, recipe).rename(state)
    else:
        state.mkdir()
        write_json(stamp, recipe)
    return state


def _aside(folder: Path, recipe: Mapping[str, Any]) -> Path:
    return folder / f"{ASIDE}{recipe['recipe'][:12]}"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which settings differ, in words."""
    one, other = _flattened(old), _flattened(new)
    names = sorted(name for name in {*one, *other} - {"recipe"} if one.get(name) != other.get(name))
    told = [f"{name}: {one.get(name)}, now {other.get(name)}" for name in names[:3]]
    return "; ".join([*told, *(["..."] if len(names) > 3 else [])]) or "other inputs"


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings inside settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flattened(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return found
