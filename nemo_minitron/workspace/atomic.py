"""A file or folder is there as a whole or not at all: it is made beside its place, and renamed into it.

What lies beside is called ``.NAME.partial``: the new one in the making; ``.NAME.before.partial`` is
the folder that it takes the place of, for a moment, and ``.NAME.old.partial`` a folder on its way
out. A kill leaves these names, and no others.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_LEFT = re.compile(r"\..+\.(partial|tmp)")  # .tmp: of files, as they were called once


def temporary_of(path: Path) -> Path:
    """Where a file or folder is made before it takes its place."""
    return path.with_name(f".{path.name}.partial")


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before.partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old.partial")


def leftovers_of(path: Path) -> tuple[Path, ...]:
    """Everything that kills can leave beside a file or folder; some of it may be there."""
    before = _before(path)
    return (temporary_of(path), before, _old(before), _old(path))


def is_leftover(name: str) -> bool:
    """Whether a name is one that only what was killed leaves."""
    return _LEFT.fullmatch(name) is not None


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """The path of a file to write: it takes ``path``'s place when the block ends well, and vanishes when not.

    A reader sees the old file or the new one, never a part. Two processes must not write one file
    at once.

    Args:
        path: the file; its folder is there.
        sync: whether the bytes are on the disk before they take the place, so that neither does a
            machine that stops leave a part.

    Raises:
        OSError: the system refuses; ``path`` is as it was.
    """
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        if sync:
            _sync(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: Path, sync: bool = True) -> Iterator[Path]:
    """A new folder that takes ``path``'s place when the block ends well, and vanishes when not.

    The old one goes only when the new one is there: ``standing`` finds one of them after a kill,
    too. What earlier kills left is cleared first. A link in its place gives way, and what it points
    at stays.

    Args:
        path: the folder; those above it are made.
        sync: whether the bytes of all files are on the disk before they take the place. Without, a
            machine that stops may leave files that are too short; a manifest tells.

    Raises:
        OSError: the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = temporary_of(path), _before(path)
    if os.path.lexists(path):
        discard(before)
    discard(temporary)
    temporary.mkdir()
    try:
        yield temporary
        if sync:
            for file in temporary.rglob("*"):
                _sync(file)
    except BaseException:
        discard(temporary)
        raise
    if os.path.lexists(path):
        path.rename(before)
    temporary.rename(path)
    discard(before)


def standing(path: Path) -> Path | None:
    """Where a folder that is only ever replaced stands: in its place, or, after a kill, just beside it."""
    return next((found for found in (path, _before(path)) if found.is_dir()), None)


def replaced_in(folder: Path, pattern: str) -> list[Path]:
    """The places of folders that are replaced, by a pattern of names; also where a kill left none there.

    As in ``standing``; each place once, in order.
    """
    beside = folder.glob(f".{pattern}.before.partial")
    names = [path.name.removeprefix(".").removesuffix(".before.partial") for path in beside]
    return sorted({*folder.glob(pattern), *(folder / name for name in names)})


def clear(path: Path) -> None:
    """Removes a folder that is replaced, and what kills have left of it."""
    for found in (path, temporary_of(path), _before(path)):
        discard(found)


def discard(folder: Path) -> None:
    """Removes a folder; it goes out of the way first, so that a part of it is never taken for the whole."""
    aside = _old(folder)
    if aside.exists():  # of a removal that was killed
        shutil.rmtree(aside)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


def _sync(path: Path) -> None:
    """Waits until a file's bytes are on the disk."""
    if path.is_symlink() or not path.is_file():
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
