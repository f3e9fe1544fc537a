"""A Prefect server of its own with SQLite, started by the tests on loopback, and a worker."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(words: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a process group of its own, ended with the block."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue


def until(condition, seconds: float = 120, every: float = 0.2):
    """Waits until a condition gives something; returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {condition}")


@pytest.fixture(scope="module")
def real_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of those who talk to the server."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    environment = {
        **os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2", "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_DEPLOYMENT_BATCH_SIZE": "10", "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "PREFECT_CLI_PROMPT": "false", "PREFECT_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    words = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]

    def healthy() -> bool:
        try:
            return bool(
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2).read() == b"true"
            )
        except OSError:
            return False

    with running(words, environment, home / "server.log") as server:
        until(lambda: healthy() or server.poll() is not None)
        assert server.poll() is None, (home / "server.log").read_text()[-2000:]
        yield environment


@pytest.fixture(scope="module")
def worker(real_server, tmp_path_factory) -> Iterator[Path]:
    """A worker of the pool 'minitron', and the file with its output."""
    log = tmp_path_factory.mktemp("worker") / "log"
    words = ["prefect", "worker", "start", "--pool", "minitron", "--type", "process", "--name", "here"]
    with running(words, {**real_server, "PYTHONPATH": str(Path.cwd())}, log):
        yield log
