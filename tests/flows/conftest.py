"""A server of Prefect's, a worker, and flows in this process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_minitron.launch import launcher as launching
from nemo_minitron.stages.result import Result
from tests.support import prefect_server
from tests.support.processes import running

prefect_home, real_server = prefect_server.prefect_home, prefect_server.real_server
served = prefect_server.served


@dataclass(frozen=True)
class Worker:
    """Its process, and the file with its output."""

    pid: int
    log: Path


@pytest.fixture(scope="module")
def worker(real_server, tmp_path_factory) -> Iterator[Worker]:
    """A worker of the pool 'minitron'."""
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
    with running(words, {**real_server, "PYTHONPATH": str(Path.cwd())}, log) as process:
        yield Worker(process.pid, log)


@pytest.fixture(scope="module")
def server(real_server):
    """Flows in this process talk to the server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: real_server["PREFECT_API_URL"]}):
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
