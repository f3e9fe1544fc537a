"""Trials of exports and chat templates, forked from a process that has imported torch and transformers and nothing else.

The product tries every export in a new process, which imports for three seconds and computes for a tenth of one, and
tests export thirty times; and it renders chat templates in a process that imports for most of a second, fifty times in
the tests. A fork of a process that has nothing but those imports runs the same program and sees the same files. Tests
of exports and of these processes themselves, fixtures of more than one test, and 'make demo' start new processes.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

PIPE = subprocess.PIPE
PLACE = "MINITRON_TEST_TRIALS"
"""Variable with the socket at which trials are asked for."""
_IMPORTED = """
import gc
gc.disable()
import torch
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationMixin
from transformers import PreTrainedTokenizerFast
import transformers.generation.utils
gc.freeze()
gc.enable()
"""
_server: "subprocess.Popen[bytes] | None" = None


def start() -> None:
    """Starts the process that is forked from, once for all test processes; it ends with this one."""
    global _server
    place = os.environ.get(PLACE)
    if _server is not None or place is None:
        return
    try:
        started = os.open(f"{place}.pid", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return
    # it is started for no test in particular
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MINITRON_TEST")}
    # -P: nothing beside this file is imported
    _server = subprocess.Popen(
        [sys.executable, "-P", __file__, place], env=environment, stdin=subprocess.PIPE
    )
    os.write(started, str(_server.pid).encode())
    os.close(started)


def run(
    command: list[str], *, cwd: Path, env: dict[str, str], input: str, **how: Any
) -> "subprocess.CompletedProcess[str]":
    """In the place of ``subprocess.run``, for ``python -c``; where nobody answers, that is what runs."""
    connection = _connected()
    if connection is None:
        return subprocess.run(command, cwd=cwd, env=env, input=input, **how)
    assert command[1] == "-c"
    with (
        connection,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(input.encode())
        given.seek(0)
        _ask(connection, command, str(cwd), env, [given.fileno(), out.fileno(), err.fileno()])
        code = int(connection.makefile().readline())
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode("utf-8", "replace"))
    return subprocess.CompletedProcess(command, code, *printed)


class _Forked:
    """What of ``subprocess.Popen`` the process for chat templates is asked for."""

    def __init__(
        self, connection: socket.socket, command: list[str], cwd: str, env: dict[str, str], err: int
    ) -> None:
        self._connection, self.returncode = connection, None
        read, write = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(read[1], "wb", 0), os.fdopen(write[0], "rb", 0)
        _ask(connection, command, cwd, env, [read[0], write[1], err])
        os.close(read[0])
        os.close(write[1])

    def kill(self) -> None:
        if self.returncode is None:
            self._connection.shutdown(socket.SHUT_WR)
            self.wait()  # a signal is there at once, what another process does about it is not

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode: int | None = int(self._connection.makefile().readline())
            self._connection.close()
        return self.returncode


def Popen(
    command: list[str], *, cwd: str, env: dict[str, str], stderr: IO[bytes], **how: Any
) -> Any:
    """In the place of ``subprocess.Popen``, for a file and pipes; where nobody answers, that is what runs."""
    connection = _connected()
    if connection is None:
        return subprocess.Popen(command, cwd=cwd, env=env, stderr=stderr, **how)
    return _Forked(connection, command, cwd, env, stderr.fileno())


def _ask(
    connection: socket.socket, command: list[str], cwd: str, env: dict[str, str], files: list[int]
) -> None:
    """Asks for a trial; it ends, at the latest, once this side of the connection does."""
    socket.send_fds(connection, [b"."], files)
    request = {"arguments": command[1:], "folder": cwd, "environment": env}
    connection.sendall(json.dumps(request).encode() + b"\n")


def _connected(seconds: float = 60) -> socket.socket | None:
    """A connection to the process, which may still import; None: there is none."""
    start()
    place = Path(os.environ[PLACE])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(place))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        try:
            os.kill(int(Path(f"{place}.pid").read_text()), 0)
        except (OSError, ValueError):
            return None
        time.sleep(0.05)
    return None


def _serve(place: Path) -> None:
    """Answers until the process that started this one is gone."""
    exec(_IMPORTED, {})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for trials
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{place}.new")
        listening.listen()
        os.rename(f"{place}.new", place)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _wait_for_a_trial(connection)
            connection.close()


def _wait_for_a_trial(connection: socket.socket) -> NoReturn:
    """Starts a trial, and sends how it ended; it ends with the process that asked for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile("rb").readline())
    trial = os.fork()
    if trial == 0:
        connection.close()
        _try(request, files)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(trial)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(trial, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1])
    try:
        connection.sendall(b"%d\n" % code)
    finally:
        os._exit(0)


def _program(words: list[str]) -> tuple[str, str, list[str]]:
    """The program that a command line runs, its name and its arguments: of ``-c``, or a file behind options."""
    if words[0] == "-c":
        return words[1], "-c", words[2:]
    first = next(place for place, word in enumerate(words) if not word.startswith("-"))
    return Path(words[first]).read_text(encoding="utf-8"), words[first], words[first + 1 :]


def _try(request: dict[str, Any], files: list[int]) -> NoReturn:
    """What ``python -c`` does, with modules that are imported."""
    for file, number in zip(files, (0, 1, 2), strict=True):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["folder"])
    program, name, arguments = _program(request["arguments"])
    sys.argv = [name, *arguments]
    code: Any = 0
    try:
        exec(compile(program, name, "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
