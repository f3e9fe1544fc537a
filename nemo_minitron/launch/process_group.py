"""One command in a process group of its own: watched, heard, stopped whole.

Its memory is really freed when it ends, a crash of it is its own, and no process of the group
outlives the one that started it, whatever that one dies of.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.launch.signs_of_life import SignsOfLife
from nemo_minitron.security.masking import masked

_TICK = 0.2
_WATCHDOG = """trap '' TERM HUP INT USR1
read line
kill -s TERM -- {target}
waited=0
while [ $waited -lt {grace} ] && kill -0 {leader} 2>/dev/null; do sleep 1; waited=$((waited + 1)); done
kill -s KILL -- {target}"""
"""Ends a process or group when the pipe's other end is gone: the system closes it however its holder dies."""


@dataclass(frozen=True)
class Limits:
    """What a process is allowed.

    Attributes:
        seconds: time in all; None: any.
        silence: seconds without output or progress; None: any.
        grace: seconds between SIGTERM, on which a training saves, and SIGKILL.
    """

    seconds: float | None = None
    silence: float | None = None
    grace: float = 60.0


@dataclass
class Ended:
    """How a process came to its end.

    Attributes:
        command: what it was.
        code: exit status; a negative one is the number of the signal that killed it.
        stopped: None, or why it was stopped by us: ``time limit``, ``silence`` or ``unwanted``.
        seconds: how long it ran.
        last: its last lines of output.
    """

    command: Sequence[str]
    code: int
    stopped: str | None
    seconds: float
    last: list[str] = field(default_factory=list)


def run_process(
    command: Sequence[str],
    environment: dict[str, str],
    log: Path,
    limits: Limits,
    on_line: Callable[[str], None],
    sign_of_life: Path | None = None,
    unwanted: Callable[[], bool] = bool,
) -> Ended:
    """Runs a command to its end.

    Its output, credentials masked, goes to ``log``, which is appended to, and line by line to
    ``on_line``. If this process is asked to end (any exception here: a cancelled flow, Ctrl-C), the
    group is asked to end, too, gets its grace, and is then killed.

    Args:
        command: program and arguments.
        environment: its environment, whole.
        log: file for its output.
        limits: when it is stopped.
        on_line: called in a thread with each line of output.
        sign_of_life: a file whose changes also count as not being silent.
        unwanted: asked every now and then; True: it is stopped, with its grace.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        _signals_later() as let_through
    ):  # one that came now would leave behind what nobody watches
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        watchdog, held = watch_over(f"-{process.pid}", limits.grace)
        pump, stopped, started = _Pump(process, log, on_line), None, time.monotonic()
        signs = SignsOfLife(sign_of_life)
        pump.start()
        try:
            let_through()
            while process.poll() is None:
                stopped = (
                    "unwanted"
                    if unwanted()
                    else _overdue(limits, started, max(pump.heard, signs.last()))
                )
                if stopped is not None:
                    end_group(process, limits.grace)
                    break
                time.sleep(_TICK)
        except BaseException:
            end_group(process, limits.grace)
            raise
        finally:
            _kill_rest(process.pid)  # a process that it left behind
            watchdog.kill()
            watchdog.wait()
            os.close(held)
            pump.join(timeout=10)
    return Ended(command, process.wait(), stopped, time.monotonic() - started, list(pump.last))


@contextlib.contextmanager
def _signals_later() -> Iterator[Callable[[], None]]:
    """Keeps SIGTERM and SIGINT back until the function that is yielded is called.

    Only a process' main thread hears them. Not by a mask, which a process that is started meanwhile
    would inherit.
    """
    before: dict[signal.Signals, Any] = {}
    came: list[int] = []

    def let_through() -> None:
        for number in list(
            before
        ):  # one that comes in between may raise: the rest is for the second call
            signal.signal(number, signal.SIG_DFL if before[number] is None else before[number])
            del before[number]
        while came:
            signal.raise_signal(came.pop(0))

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.getsignal(number)
                signal.signal(number, lambda number, frame: came.append(number))
        yield let_through
    finally:
        let_through()


def watch_over(target: str, grace: float) -> tuple[subprocess.Popen[bytes], int]:
    """Starts what ends a process, or with a minus before it a group, if this process dies.

    Returns:
        The watchdog, and the file descriptor that must stay open until then.
    """
    reads, writes = os.pipe()
    script = _WATCHDOG.format(target=target, leader=target.lstrip("-"), grace=round(grace))
    watchdog = subprocess.Popen(
        ["/bin/sh", "-c", script], stdin=reads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    os.close(reads)
    return watchdog, writes


def _overdue(limits: Limits, started: float, heard: float) -> str | None:
    """Why a process must be stopped now; None: it need not be. Times are of time.monotonic."""
    now = time.monotonic()
    if limits.seconds is not None and now - started > limits.seconds:
        return "time limit"
    return "silence" if limits.silence is not None and now - heard > limits.silence else None


def end_group(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """Asks a process group to end, waits, and kills what is left."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        except BaseException:  # asked a second time: at once, then
            _kill_rest(process.pid)
            raise
    _kill_rest(process.pid)
    process.wait()


def _kill_rest(group: int) -> None:
    _signal(group, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or only a zombie is left
        os.killpg(group, number)


class _Pump(threading.Thread):
    """Reads a process' output, so that it never waits for a reader.

    Attributes:
        heard: when there was output last (time.monotonic).
        last: the last lines.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", log: Path, on_line: Callable[[str], None]
    ) -> None:
        super().__init__(daemon=True)
        assert process.stdout is not None
        self._source, self._log, self._on_line = process.stdout, log, on_line
        self.heard = time.monotonic()
        self.last: deque[str] = deque(maxlen=20)

    def run(self) -> None:
        """Until the output's end; whatever happens to what is read, reading goes on."""
        rest = b""
        while block := os.read(self._source.fileno(), 65536):
            self.heard = time.monotonic()
            *lines, rest = re.split(rb"[\r\n]+", rest + block)
            self._take(lines)
        self._take([rest])

    def _take(self, lines: list[bytes]) -> None:
        texts = [masked(text) for line in lines if (text := line.decode(errors="replace").rstrip())]
        self.last.extend(texts)
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in texts)  # a full disk is for the stage to find
        for text in texts:
            # nor may a listener stop it: rich ends the process where its terminal, a worker, has
            # gone
            with contextlib.suppress(Exception, SystemExit):
                self._on_line(text)
