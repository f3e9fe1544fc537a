"""A server of Prefect's, for a folder of tests whose conftest imports this: it computes while nobody asks it."""

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.forks import MARK
from tests.support.processes import free_port, running, until


@pytest.fixture(scope="session")
def prefect_home(once: Callable[..., Path]) -> Path:
    """A home of Prefect's with an empty database, to be copied: making its tables takes as long as a server."""

    def make(folder: Path) -> None:
        words = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
        subprocess.run(
            words, env={**os.environ, "PREFECT_HOME": str(folder)}, check=True, capture_output=True
        )

    return once("prefect-home", make)


@pytest.fixture(scope="package")
def real_server(
    tmp_path_factory: pytest.TempPathFactory, prefect_home: Path
) -> Iterator[dict[str, str]]:
    """A Prefect server with SQLite, on loopback: the environment of those who talk to it."""
    home = shutil.copytree(prefect_home, tmp_path_factory.mktemp("prefect") / "home")
    port = free_port()
    environment = {
        **os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "4", "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_DEPLOYMENT_BATCH_SIZE": "10", "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "PREFECT_CLI_PROMPT": "false", "PREFECT_LOGGING_LEVEL": "INFO",
        # it computes while nobody asks it: what the tests do without
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false", "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_REPOSSESSOR_ENABLED": "false",
    }  # fmt: skip
    words = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]

    def healthy() -> bool:
        try:
            address = f"http://127.0.0.1:{port}/api/health"
            return bool(urllib.request.urlopen(address, timeout=2).read() == b"true")
        except OSError:
            return False

    with running(words, environment, home / "server.log") as server:
        until(lambda: healthy() or server.poll() is not None)
        assert server.poll() is None, (home / "server.log").read_text()[-2000:]
        del environment[MARK]
        yield environment


@pytest.fixture(scope="package")
def served(real_server: dict[str, str]) -> dict[str, str]:
    """What makes a run of the command line talk to the server, instead of starting one of its own."""
    return {name: real_server[name] for name in ("PREFECT_HOME", "PREFECT_API_URL")}
