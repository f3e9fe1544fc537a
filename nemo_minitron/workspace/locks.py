"""A workspace: the folder of one run, with one sub-folder per artifact and a lock."""

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from nemo_minitron.artifacts.log import read_log
from nemo_minitron.artifacts.manifest import Input, damage, now, read_manifest, verify, write_json
from nemo_minitron.artifacts.masking import masked

ARTIFACTS = (
    "pretrain",
    "teacher",
    "correct",
    "scores",
    "plan",
    "pruned",
    "logits",
    "student",
    "scratch",
    "report",
    "export",
)
"""Sub-folders of a workspace that can hold an artifact, in the order in which they are made."""
COMMANDS = "commands.jsonl"
"""Commands that worked on the workspace."""


HOLDER = ".holder.json"
"""Which process holds the workspace, for the eyes of others; the lock itself is the operating system's."""
STAGE_LOCK = ".stage.lock"
TRACES = (".lock", STAGE_LOCK, HOLDER, COMMANDS)
"""Files that a run leaves although nothing came of it."""


def holder(workspace: Path) -> str:
    """Who holds the workspace, or held it last, in words; empty where nobody wrote it down."""
    try:
        found = json.loads((workspace / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since'][:19].replace('T', ' ')} UTC"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _busy(workspace: Path) -> ValueError:
    who = holder(workspace)
    return ValueError(
        f"workspace {workspace}: another run is using it{f' ({who})' if who else ''}; wait for it to end, or "
        "choose another one"
    )


def _acquired(workspace: Path, wait: float) -> BaseFileLock:
    """The workspace's lock, held.

    Raises:
        ValueError: another run holds it, or the folder cannot be made.
    """
    deadline = time.monotonic() + wait
    while True:
        lock = FileLock(workspace / ".lock", timeout=max(0.0, deadline - time.monotonic()))
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
    lock = _acquired(workspace, wait)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
    try:
        with contextlib.suppress(OSError):  # a full disk is for the stages to find
            write_json(workspace / HOLDER, me)
        yield
    finally:
        (workspace / HOLDER).unlink(missing_ok=True)
        if {path.name for path in workspace.iterdir()} <= set(TRACES):  # nothing came of it: no trace
            for name in TRACES:
                (workspace / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                workspace.rmdir()
        lock.release()


_PATIENCE = 120.0
"""Seconds: what a killed run's stage may need to save what it did."""


@contextlib.contextmanager
def alone(workspace: Path, patience: float = _PATIENCE) -> Iterator[None]:
    """Holds the workspace for the one stage that works in it, in whatever process that is.

    A flow holds the workspace too; but when a flow is killed its stage needs a moment to save and end, or,
    as a batch job, goes on, and the next run may come meanwhile.

    Raises:
        ValueError: another process still works there after ``patience`` seconds.
    """
    lock = FileLock(workspace / STAGE_LOCK, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout:
            print(f"workspace {workspace}: a stage of an earlier run is ending; waiting", file=sys.stderr)
            lock.acquire(timeout=patience)
    except Timeout:
        raise ValueError(
            f"workspace {workspace}: a stage of an earlier run is still at work; wait for it, or end it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def note_command(workspace: Path, words: Sequence[str]) -> None:
    """Writes down the command that a run was started with, for its report; credentials are masked."""
    text = masked(shlex.join(words))
    if commands_in(workspace)[-1:] != [text]:
        with (workspace / COMMANDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": now(), "command": text}) + "\n")


def commands_in(workspace: Path) -> list[str]:
    """Commands that worked on a workspace, in order."""
    return [line["command"] for line in read_log(workspace / COMMANDS)]


def input_artifact(workspace: Path, name: str, made_by: str) -> Input:
    """An artifact of the workspace as the input of another.

    Raises:
        ValueError: it does not exist yet, or what it was made from has changed since.
    """
    manifest = read_manifest(workspace / name)
    if manifest is None:
        raise ValueError(
            f"{workspace / name}: not made yet (or not complete); run 'minitron {made_by}' first"
        )
    damaged = damage(workspace / name, manifest)
    if damaged is not None:
        raise ValueError(f"{workspace / name}: damaged: {damaged}; run 'minitron {made_by}' again")
    for item in manifest.inputs:
        inside = (
            item.path in ARTIFACTS and item.finished is not None
        )  # else a folder outside, of the same name
        upstream = read_manifest(workspace / item.path) if inside else None
        if upstream is not None and upstream.fingerprint != item.fingerprint:
            raise ValueError(
                f"{workspace / name}: made from another {item.path} than the one there now; "
                f"run 'minitron {made_by}' again"
            )
    return Input(name, manifest.fingerprint, manifest.finished)


def artifacts_in(workspace: Path) -> list[Path]:
    """Folders of a workspace that hold a complete artifact, in pipeline order."""
    return [workspace / name for name in ARTIFACTS if (workspace / name / "manifest.json").is_file()]


def verify_tree(path: Path) -> tuple[int, list[str]]:
    """Re-hashes an artifact or all artifacts of a workspace.

    Returns:
        How many artifacts were checked, and one line per defect.

    Raises:
        ValueError: nothing there carries a manifest.
    """
    caches = sorted(found.parent for found in path.glob("tokens/*/manifest.json"))
    folders = [path] if (path / "manifest.json").is_file() else [*artifacts_in(path), *caches]
    if not folders:
        raise ValueError(
            f"{path}: no manifest.json here or in its sub-folders; this is neither artifact nor workspace"
        )
    return len(folders), [problem for folder in folders for problem in verify(folder)]
