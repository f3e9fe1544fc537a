"""Locks: one run at a time in a workspace, and one stage."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from nemo_minitron.security.links import check_tree
from nemo_minitron.workspace.atomic import discard
from nemo_minitron.workspace.layout import (
    COMMANDS,
    DATA_COMMITS,
    FILES,
    FOLDERS,
    HOLDER,
    LOCK,
    STAGE_LOCK,
    Workspace,
    is_own,
)
from nemo_minitron.workspace.manifest import now, write_json
from nemo_minitron.workspace.typed_json import read_json

TRACES = (LOCK, STAGE_LOCK, HOLDER, COMMANDS)
"""Files that a run leaves although nothing came of it."""


@dataclass(frozen=True)
class _Holder:
    pid: int
    host: str
    since: str


def holder(workspace: Path) -> str:
    """Who holds the workspace, or held it last, in words; empty where nobody wrote it down."""
    try:
        found: _Holder = read_json(Workspace(workspace).holder, _Holder)
    except (OSError, ValueError):
        return ""
    return f"process {found.pid} on {found.host}, since {found.since[:19].replace('T', ' ')} UTC"


def _busy(workspace: Path) -> ValueError:
    who = holder(workspace)
    return ValueError(
        f"workspace {workspace}: another run is using it{f' ({who})' if who else ''}; wait for it to end, or "
        "choose another one"
    )


def _check(workspace: Path) -> None:
    """Refuses a workspace that reaches out of itself; a variant's shares what its sweep's holds.

    What else lies in the folder is the user's (a virtual environment, links to data), and is not
    touched.

    Raises:
        ValueError: it does, or the user keeps a file where a folder belongs, or a folder for a file.
    """
    for names, other, found in (
        (FOLDERS, Path.is_file, "a file"),
        (FILES, Path.is_dir, "a folder"),
    ):
        for name in names:
            if other(workspace / name):
                raise ValueError(
                    f"{workspace / name}: expected none or one that this package made, found {found} of "
                    "this name; nothing was touched: move it, or choose another workspace"
                )
    around = _shared_from(workspace)
    for path in sorted(workspace.iterdir()) if workspace.is_dir() else ():
        if is_own(path.name) or path == Workspace(workspace).archive:
            check_tree(path, around)


def _shared_from(workspace: Path) -> Path:
    """The workspace that one is a variant, a round or a step of; of a round in a step the cascade's."""
    up = workspace.absolute().parents
    if len(up) > 2 and up[0].name in ("variants", "steps"):
        return _shared_from(up[1])
    return _shared_from(up[2]) if len(up) > 3 and up[1].name == "rounds" else workspace


def _acquired(workspace: Path, wait: float) -> BaseFileLock:
    """The workspace's lock, held.

    Raises:
        ValueError: another run holds it, or the folder cannot be made.
    """
    deadline = time.monotonic() + wait
    _check(workspace)
    while True:
        lock = FileLock(Workspace(workspace).lock, timeout=max(0.0, deadline - time.monotonic()))
        try:
            workspace.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            return lock
        except Timeout:
            raise _busy(workspace) from None
        except OSError as error:
            # a run of which nothing came removes its folder, also from under one that waits for it
            if not isinstance(error, FileNotFoundError) or time.monotonic() > deadline + 1:
                text = f"workspace {workspace}: cannot be used as a folder: {error.strerror}"
                raise ValueError(text) from error


_LENT: set[tuple[Path, int]] = set()
"""Workspaces that this process holds for what it calls, with the thread that calls."""


@contextlib.contextmanager
def locked_and_lent(workspace: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds the workspace as ``locked`` does, and lets what is called in the block hold it again.

    So the command line can hold it from before Prefect starts, for the flow that it runs.

    Raises:
        ValueError: another run holds it.
    """
    with locked(workspace, wait):
        lent = (workspace.resolve(), threading.get_ident())
        _LENT.add(lent)
        try:
            yield
        finally:
            _LENT.discard(lent)


@contextlib.contextmanager
def locked(workspace: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds the workspace for this process; the operating system lets go of it when the process dies.

    So there are no stale locks to be removed: the file stays, and holds nobody back.

    Args:
        workspace: the folder.
        wait: seconds to wait for another run to end.

    Raises:
        ValueError: another run holds it.
    """
    if (workspace.resolve(), threading.get_ident()) in _LENT:
        yield
        return
    lock = _acquired(workspace, wait)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
    try:
        with contextlib.suppress(OSError):  # a full disk is for the stages to find
            write_json(Workspace(workspace).holder, me)
        yield
    finally:
        Workspace(workspace).holder.unlink(missing_ok=True)
        left = {path.name for path in workspace.iterdir()}
        if left <= {*TRACES, DATA_COMMITS}:  # nothing came of it: no trace
            for name in TRACES:
                (workspace / name).unlink(missing_ok=True)
            discard(Workspace(workspace).data_commits)
            with contextlib.suppress(OSError):
                workspace.rmdir()
        lock.release()


_PATIENCE = 120.0
"""Seconds: what a killed run's stage may need to save what it did."""


@contextlib.contextmanager
def hold_stage(workspace: Path, patience: float = _PATIENCE) -> Iterator[None]:
    """Holds the workspace for the one stage that works in it, in whatever process that is.

    A flow holds the workspace too; but when a flow is killed its stage needs a moment to save and
    end, or, as a batch job, goes on, and the next run may come meanwhile.

    Raises:
        ValueError: another process still works there after ``patience`` seconds.
    """
    lock = FileLock(Workspace(workspace).stage_lock, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout:
            print(
                f"workspace {workspace}: a stage of an earlier run is ending; waiting",
                file=sys.stderr,
            )
            lock.acquire(timeout=patience)
    except Timeout:
        raise ValueError(
            f"workspace {workspace}: a stage of an earlier run is still at work; wait for it, or end it"
        ) from None
    try:
        yield
    finally:
        lock.release()
