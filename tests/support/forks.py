"""Processes of the command line, forked from one that has imported what all of them need.

Importing NeMo takes seconds of computing, which every process of its own would spend anew. The one they are forked
from has no threads of Python, and no tensor but what libraries made. A fork is a process like any other, with a number,
environment, output and end of its own; only in lists of processes it bears the line of the one it was forked from.
"""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from nemo_minitron.data import chat_template_process
from nemo_minitron.families.table import OWN_TABLES, families
from nemo_minitron.release import quickstart
from tests.support import forked_trials

MARK = "MINITRON_TEST"
"""Variable that names the test which a process was started for."""
CONSTANT = "MINITRON_TEST_CONSTANT"
"""Variable with a module, a constant of it and the whole number that a fork takes for it: ``MODULE:NAME:NUMBER``."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.support.imported"])
_READ_AT_IMPORT = ("HF_DATASETS_", "PYTHON", "OMP_", "LD_", "TRANSFORMERS_OFFLINE")
"""Beginnings of variables that are read while all is imported, those of huggingface_hub aside."""
_first: dict[str, str] = {}
alive: list["Fork"] = []
"""Those that nobody has seen the end of yet."""


def fits(environment: dict[str, str]) -> bool:
    """Whether a fork is what a new process with this environment would be."""

    def read(variables: dict[str, str]) -> dict[str, str]:
        return {name: variables[name] for name in variables if name.startswith(_READ_AT_IMPORT)}

    if not _first:
        _first.update(os.environ)
    return read(environment) == read(_first)


def _read_again() -> None:
    """Lets what is imported read its variables anew: huggingface_hub's, and the one of a user's own tables."""
    from huggingface_hub import constants, hf_api

    if os.environ.get(OWN_TABLES):
        families.cache_clear()
    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT


def _run(
    arguments: list[str], environment: dict[str, str], folder: str, outputs: list[str]
) -> None:
    """What a fork does: as ``python -m nemo_minitron`` in that folder and environment, leading a process group."""
    os.setsid()
    for name, number in zip(outputs, (1, 2), strict=True):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["minitron", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _read_again()
    if forked_trials.PLACE in environment:
        vars(quickstart)["subprocess"] = vars(chat_template_process)["subprocess"] = forked_trials
    if CONSTANT in environment:
        module, constant, number = environment[CONSTANT].split(":")
        setattr(importlib.import_module(module), constant, int(number))
    from nemo_minitron.cli.main import main

    code: Any = 1
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # as Python does before its exit functions: threads are waited for
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)


class Fork:
    """A command at work, with what of ``subprocess.Popen`` the tests need."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], folder: Path | None = None
    ) -> None:
        assert fits(environment)
        forked_trials.start()
        self.args, self.mark = arguments, environment.get(MARK)
        self._folder = tempfile.TemporaryDirectory(prefix="minitron-fork-")
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        given = (arguments, environment, str(folder or Path.cwd()), [str(p) for p in self._outputs])
        self._process = _FORKS.Process(target=_run, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        alive.append(self)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        code = self._process.exitcode
        if code is not None and self in alive:
            alive.remove(self)
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; what it printed, and its error output."""
        self.wait(timeout)
        out, err = (
            path.read_text(errors="replace") if path.exists() else "" for path in self._outputs
        )
        return out, err
