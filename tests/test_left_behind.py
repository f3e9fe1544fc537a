"""A test that leaves a process at work fails, and the process is ended."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

LEAVING = """
import subprocess, sys
import pytest

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
AWAY = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"


def start(*words):
    process = subprocess.Popen([sys.executable, "-c", *words], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\\n"
    print("PID", process.pid)
    return process


@pytest.fixture(scope="module")
def shared():
    process = start(SLEEP)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def own():
    process = start(SLEEP)
    yield process
    process.kill()
    process.wait()


def test_a_child():
    start(SLEEP)


def test_one_that_is_deaf_and_somebody_elses_child():
    start(AWAY, DEAF).wait()


def test_shared(shared):
    assert shared.poll() is None


def test_own(own, shared):
    assert shared.poll() is None
"""


def test_what_a_test_leaves_at_work_is_ended_and_fails_it(tmp_path):
    path = tmp_path / "test_leaving.py"
    path.write_text(LEAVING)
    place = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "MINITRON_PATIENCE": "0.5",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, "-rA", "-p", "tests.support.left_behind",
         "-p", "no:cacheprovider", str(path)], env=place, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "4 passed, 2 errors" in done.stdout, done.stdout
    for name in ("test_a_child", "test_one_that_is_deaf_and_somebody_elses_child"):
        assert f"ERROR test_leaving.py::{name}" in done.stdout
    assert done.stdout.count("left at work: ") >= 2
    assert not [process for process in psutil.process_iter() if folder(process) == str(tmp_path)]


def folder(process):
    try:
        return process.cwd()
    except psutil.Error:
        return ""
