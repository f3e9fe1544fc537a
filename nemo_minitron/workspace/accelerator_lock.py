"""Locks on accelerators, of which a machine has few and its flows many.

Two for each, as for a workspace: a flow holds one while its stage computes. The stage's process
holds the other, for it may outlive a flow that was killed while it saves what it did. A stage that
is run by hand holds both.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

ENDING_SECONDS = 120.0
"""Seconds that a stage that was asked to end may take beyond its ``launch.grace``."""


def locks() -> Path:
    """The folder of all users' locks on accelerators.

    Raises:
        ValueError: it is there, and not for all to write.
    """
    folder = Path(tempfile.gettempdir()) / "nemo_minitron-locks"
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(
            0o777
        )  # whatever the umask; not sticky, else Linux keeps one user from another's file
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"launch.accelerator: {folder}: expected a folder that all users may write to"
        )
    return folder


def lock_on(accelerator: str, whose: str) -> FileLock:
    """The lock that a ``flow`` or a ``stage`` holds."""
    name = re.sub(r"[^a-z0-9]+", "-", accelerator.lower()).strip("-")
    return FileLock(locks() / f"{name}.{whose}.lock", mode=0o666, timeout=0)


@contextlib.contextmanager
def in_use(accelerator: str | None, patience: float) -> Iterator[None]:
    """Holds the accelerator, where there is one, for a stage's process.

    Raises:
        ConnectionError: the stage of a flow that is gone does not end in ``patience`` seconds;
            another try may find it gone too.
    """
    if accelerator is None:
        yield
        return
    lock = lock_on(accelerator, "stage")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise ConnectionError(
            f"launch.accelerator: {accelerator}: a stage of another flow, now gone, still holds it"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def hold_accelerator(accelerator: str | None, name: str) -> Iterator[None]:
    """Holds the accelerator, where there is one, as a flow does: waits for others, however long they take."""
    if accelerator is None:
        yield
        return
    lock = lock_on(accelerator, "flow")
    try:
        lock.acquire()
    except Timeout:
        print(f"{name}: waiting for {accelerator}, which another flow holds", file=sys.stderr)
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()
