"""A plugin of pytest: a test that has started processes and left them at work fails, and they are ended.

Each process inherits the name of the test it was started for; fixtures of more than one test start theirs for nobody.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forks
from tests.support.forks import MARK

SHARED = "shared"
"""In the place of a test's name: what fixtures of more than one test start."""
PATIENCE = float(os.environ.get("MINITRON_PATIENCE", "10"))
"""Seconds that a process has to end by itself, and again to end when it is told to."""
_OF_PYTHON = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


def _at_work(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Those that have inherited a mark, whosever children they are by now."""
    wanted = f"{MARK}={mark}".encode()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError, psutil.Error):
                if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    yield psutil.Process(int(name))


def _of_python(process: psutil.Process) -> bool:
    """Whether it is one that Python keeps for all processes to come."""
    with contextlib.suppress(psutil.Error):
        return process.ppid() == os.getpid() and any(
            name in " ".join(process.cmdline()) for name in _OF_PYTHON
        )
    return True


def left_behind(mark: str) -> list[psutil.Process]:
    """Processes at work that were started for a test, however deep below it, by their mark."""
    found = {process for process in _marked(mark) if not _of_python(process)}
    for fork in list(forks.alive):
        if fork.poll() is None and fork.mark == mark:
            found.add(psutil.Process(fork.pid))
    for process in list(found):
        with contextlib.suppress(psutil.Error):
            found |= set(process.children(recursive=True))
    return [process for process in found if _at_work(process)]


def end(processes: list[psutil.Process], patience: float = PATIENCE) -> list[str]:
    """Ends processes that do not end by themselves, by force where need be; returns what each of them ran."""
    lines = []
    processes = psutil.wait_procs(processes, timeout=patience)[1]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            lines.append(f"{process.pid}: {' '.join(process.cmdline())[:300]}")
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=patience)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=patience)
    return lines


def _mark_of(item: pytest.Item) -> str:
    return f"{os.getpid()} {item.nodeid}"


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """What a fixture of several tests starts is nobody's alone."""
    before = os.environ.get(MARK)
    if fixturedef.scope != "function":
        os.environ[MARK] = SHARED
    try:
        return (yield)
    finally:
        if before is not None:
            os.environ[MARK] = before


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    os.environ[MARK] = _mark_of(item)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Ends what a test has started and left at work, and fails it."""
    try:
        return (yield)
    finally:
        left = end(left_behind(_mark_of(item)))
        if left:
            pytest.fail("left at work: " + "; ".join(left), pytrace=False)
