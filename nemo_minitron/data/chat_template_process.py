"""The process that runs a chat template, seen from the process that owns it."""

import collections
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from nemo_minitron.security.plain_text import plain

START_SECONDS = 300.0
"""How long the process may take to start: imports from a network's disk that is busy."""
_SLICES = 20
_WORKER = Path(__file__).with_name("chat_template_worker.py")
_KEPT = ("TZ", "TZDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""What the process gets of the environment: the time that strftime_now tells, and what Python needs."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}


class Lost(Exception):
    """The process ended without being asked to.

    Attributes:
        alarmed: by its own alarm, since a rendering did not end.
    """

    def __init__(self, how: str, alarmed: bool = False) -> None:
        super().__init__(how)
        self.alarmed = alarmed


class Silent(Exception):
    """The process does not answer in time."""


class Worker:
    """The process, seen from its owner.

    Attributes:
        process: None once it is closed, and in a process that was forked from its owner.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        """Starts it, and waits until it is ready.

        Args:
            settings: its first line.

        Raises:
            RuntimeError: it does not start.
        """
        with tempfile.TemporaryFile() as complaints:
            self.process: subprocess.Popen[bytes] | None = _started(complaints)
            _running.add(self)
            try:
                self._prepare(self.process)
                self.send([json.dumps(settings).encode() + b"\n"])
                self.line(START_SECONDS, empty=True)
            except (Lost, Silent) as error:
                self.close()
                complaints.seek(0)
                said = complaints.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
                raise RuntimeError(
                    f"the process for chat templates does not start: {plain(said, 300) or error}"
                ) from error
            except BaseException:
                self.close()
                raise

    def _prepare(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None and process.stdout is not None
        self._to, self._from = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._to, False)
        self._readable, self._either = select.poll(), select.poll()
        self._readable.register(self._from, select.POLLIN)
        self._either.register(self._from, select.POLLIN)
        self._either.register(self._to, select.POLLOUT)
        self._unsent = memoryview(b"")
        self._lines: collections.deque[bytes] = collections.deque()
        self._begun: list[bytes] = []

    def send(self, lines: Sequence[bytes]) -> None:
        """Sends as much as the pipe takes; the rest is sent while waiting for answers."""
        self._unsent = memoryview(b"".join([self._unsent, *lines]))
        self._write()

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._to, self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it has ended; what it said before is still to be read
            self._unsent = memoryview(b"")

    def line(self, seconds: float, empty: bool = False) -> bytes:
        """The next line that is not empty; with ``empty`` the next line of any kind.

        Args:
            seconds: how long the process may be without a sign of life.
            empty: whether an empty line will do; else it is no more than such a sign.

        Raises:
            Lost: the process has ended.
            Silent: it gives no sign.
        """
        while True:
            while self._lines:
                line = self._lines.popleft()
                if line or empty:
                    return line
            # in slices: a job that was suspended meanwhile has not waited, and continues
            pipes = self._either if self._unsent else self._readable
            ready = next(
                filter(None, (pipes.poll(1000 * seconds / _SLICES) for _ in range(_SLICES))), None
            )
            if ready is None:
                raise Silent(f"no answer within {seconds:g} s")
            if any(pipe == self._to for pipe, _event in ready):
                self._write()
            if any(pipe == self._from for pipe, _event in ready):
                self._read()

    def _read(self) -> None:
        some = os.read(self._from, 2**16)
        if not some:
            raise self._lost()
        end, *more = some.split(b"\n")
        self._begun.append(end)
        for begin in more:
            self._lines.append(b"".join(self._begun))
            self._begun = [begin]

    def _lost(self) -> Lost:
        assert self.process is not None
        self.process.kill()  # what has closed its pipes is of no use, ended or not
        status = self.process.wait()
        if status >= 0:
            return Lost(f"exit status {status}")
        return Lost(f"{signal.strsignal(-status)} (signal {-status})", -status == signal.SIGALRM)

    def close(self) -> None:
        """Ends the process, reaps it and closes its pipes."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            _close_pipes(process)
            process.wait()

    def forget(self) -> None:
        """Leaves a process alone that belongs to the process this one was forked from."""
        process, self.process = self.process, None
        if process is not None:
            _close_pipes(
                process
            )  # held open here, they would keep it from seeing that its owner is gone
            process.returncode = 0  # not this process' child: nothing to wait for


_running: "weakref.WeakSet[Worker]" = weakref.WeakSet()


def _forget_all() -> None:
    for worker in list(_running):
        worker.forget()


os.register_at_fork(after_in_child=_forget_all)


def _started(complaints: IO[bytes]) -> "subprocess.Popen[bytes]":
    environment = {**_ENVIRONMENT, **{key: os.environ[key] for key in _KEPT if key in os.environ}}
    # -I: no PYTHON* variable, nothing importable beside the file or in the working folder; -B: no
    # bytecode
    return subprocess.Popen(
        [sys.executable, "-I", "-B", str(_WORKER)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, bufsize=0, cwd="/", env=environment,
    )  # fmt: skip


def _close_pipes(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
