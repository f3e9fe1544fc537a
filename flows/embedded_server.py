"""Prefect's server for one run: started by the run, and ended with it, however the run ends.

The server holds the read end of a pipe whose write end only the run holds. The operating system
closes the pipe when the run's process dies, whatever it dies of, and the server ends at the pipe's
end. It hears no signals: Ctrl-C and SIGTERM often reach every process of a terminal, a batch job or
a service, and the run must still be able to tell the server that it ends.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

import httpx
from prefect.context import refresh_global_settings_context
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_START = """import gc
import sys
gc.disable()
sys.path[:] = [entry for entry in sys.path if entry]
from nemo_minitron.flows.embedded_server import serve
serve(int(sys.argv[1]))"""
"""The server's program: nothing is imported from the working folder, where a random.py may lie.

To look for garbage while it imports takes a third of its start, and there is none.
"""
_PORT_TAKEN = 3
"""Exit status of a server that cannot listen on its port."""
_ENDING_SECONDS = 5.0


class EmbeddedServer:
    """The server of this process, where the user has configured none.

    Prefect would start one by itself, and for that import the server's code into the run's own
    process, too, which takes seconds. It is given the address of this one instead.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float | None = None) -> None:
        """Starts the server, waits until it answers, and lets Prefect in this process talk to it.

        Args:
            timeout: seconds to wait; None: Prefect's setting.

        Raises:
            ValueError: Prefect's home folder cannot be written.
            RuntimeError: the server ends at once, or does not answer in time.
        """
        _check_home(Path(PREFECT_HOME.value()))
        limit = timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        deadline = time.monotonic() + limit
        running = False
        with tempfile.TemporaryFile() as output:
            while not running:
                port = _free_port()
                self._process = _process(port, output)
                try:
                    running = _answers(self._process, port, deadline)
                finally:
                    status = self._process.poll()
                    if not running:
                        self.stop()
                if not running and status != _PORT_TAKEN:
                    ended = f"did not answer in {limit:g} s" if status is None else "ended at once"
                    raise RuntimeError(f"Prefect's server {ended}{_last_line(output)}")
        os.environ[PREFECT_API_URL.name] = _url(port)
        refresh_global_settings_context()

    def stop(self) -> None:
        """Ends the server by the pipe's end; kills it if it does not end."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def _check_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise ValueError(
            f"PREFECT_HOME: {home} cannot be written ({error.strerror}); set it to a folder of yours"
        ) from None


def _process(port: int, output: IO[bytes]) -> "subprocess.Popen[bytes]":
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # stays so in what is started now
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START, str(port)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                **get_current_settings().to_environment_variables(exclude_unset=True),
                # as Prefect starts its own: one process of its API, without schedules and pages
                "PREFECT_UI_ENABLED": "0",
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
            },
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answers(process: "subprocess.Popen[bytes]", port: int, deadline: float) -> bool:
    """Whether the server answers before it ends and before the deadline."""
    with httpx.Client(trust_env=False) as client:  # no proxy stands between this machine and itself
        while process.poll() is None and time.monotonic() < deadline:
            try:
                # costs less than a request, and the server takes seconds
                with socket.create_connection(("127.0.0.1", port), 1):
                    pass
                if client.get(f"{_url(port)}/health").status_code == httpx.codes.OK:
                    return True
            except (httpx.TransportError, OSError):
                pass
            time.sleep(0.1)
    return False


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def serve(port: int) -> None:
    """The server's process: serves Prefect's API on this machine until standard input ends."""
    import uvicorn
    from prefect.server.api.server import create_app

    gc.freeze()
    gc.enable()
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError:  # another run was faster
        sys.exit(_PORT_TAKEN)
    server = uvicorn.Server(
        uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on")
    )

    def end() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=end, daemon=True).start()
    server.run(sockets=[listening])
    sys.exit(0 if server.started else 1)
