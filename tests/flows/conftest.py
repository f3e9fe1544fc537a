"""A Prefect server of its own with SQLite, started by the tests on loopback, and a worker."""

import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_minitron.launch import launcher as launching
from nemo_minitron.stages.result import Result
from tests.support.processes import running, until


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


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
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2).read()
                == b"true"
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
    words = [
        "prefect",
        "worker",
        "start",
        "--pool",
        "minitron",
        "--type",
        "process",
        "--name",
        "here",
    ]
    with running(words, {**real_server, "PYTHONPATH": str(Path.cwd())}, log):
        yield log


@pytest.fixture(scope="module")
def server():
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def played(monkeypatch, tmp_path):
    """Puts what a test gives in the place of the stages; one entry for each try."""

    def play(*tries):
        left, seen = list(tries), []

        def run_stage(name, config):
            seen.append(config)
            outcome = left.pop(0)
            if isinstance(outcome, BaseException):
                raise outcome
            if callable(outcome):
                outcome()
            return Result(name, tmp_path, True, "done")

        monkeypatch.setattr(launching, "run_alone", run_stage)
        return seen

    return play
