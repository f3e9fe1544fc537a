"""Runs the flow in this process, with Prefect's embedded server: nothing to install, nothing to start."""

import atexit
import contextlib
import gc
import logging
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from nemo_minitron.config.compose import as_dict
from nemo_minitron.config.config import Config
from nemo_minitron.security.masking import masked
from nemo_minitron.stages.result import Result


def prepare_environment() -> None:
    """Settings that must stand before prefect is imported; what the user has set stays.

    A user without a Prefect of their own gets a home with Prefect's version in its name: its
    database cannot be downgraded, and a mismatch shows as nothing but a start-up time-out.
    """
    has_own = any(
        name in os.environ for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE")
    )
    if not has_own and not (Path.home() / ".prefect" / "profiles.toml").is_file():
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["PREFECT_HOME"] = str(
            _existing(cache / "nemo_minitron" / f"prefect-{version('prefect')}")
        )
    with contextlib.suppress(OSError):  # Prefect makes no parents; said by whoever needs the folder
        Path(os.environ.get("PREFECT_HOME", Path.home())).mkdir(parents=True, exist_ok=True)
    _reach_own_server()
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def _existing(folder: Path) -> Path:
    """The folder, made if need be (Prefect makes no parents); a temporary one where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return temporary_home()
    return folder


def temporary_home() -> Path:
    """A folder that lives as long as this process; those of processes that were killed are removed.

    Its process holds a lock in it, which the system lets go with the process, whatever that dies of.
    """
    for other in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        _remove_abandoned(other)
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    lock = FileLock(folder / _HELD)
    lock.acquire(timeout=0)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a fork of it
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


_TEMPORARY, _HELD = "minitron-prefect-", ".held"
_MADE_SECONDS = 60.0
"""A folder without a lock that is older than this is not just being made."""


def _remove_abandoned(folder: Path) -> None:
    """Removes a temporary home of this user's whose process is gone; anything else is left alone."""
    with contextlib.suppress(OSError, Timeout):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return
        if (folder / _HELD).is_file():
            with FileLock(folder / _HELD, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        elif time.time() - found.st_mtime > _MADE_SECONDS:
            folder.rmdir()  # killed as it was made: nothing is in it


def run_here(config: Config, words: Sequence[str]) -> list[Result]:
    """Runs the whole pipeline, as the command line's ``words`` ask; returns what each stage reports."""
    prepare_environment()
    # a failure reaches the caller as an exception; Prefect's own log would print its traceback as
    # well
    if "PREFECT_LOGGING_LEVEL" not in os.environ:
        os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
        # these say at exit what they still have to send
        for service in ("EventsWorker", "APILogWorker"):
            logging.getLogger(service).setLevel(logging.CRITICAL)
    gc.disable()  # there is no garbage yet, and to look for it takes a third of these imports
    from prefect import tags
    from prefect.settings import PREFECT_API_URL

    from nemo_minitron.flows.compress import compress
    from nemo_minitron.flows.embedded_server import EmbeddedServer

    gc.freeze()
    gc.enable()
    if not PREFECT_API_URL.value():
        server = EmbeddedServer()
        atexit.register(server.stop)  # whatever Prefect still has to say at exit is said before
        server.start()
    with tags("nemo_minitron"):
        results: list[Result] = compress(config=as_dict(config), command=masked(shlex.join(words)))
    return results


def _reach_own_server() -> None:
    """A proxy is not asked for the server on this machine (httpx and websockets read NO_PROXY)."""
    names = ("NO_PROXY", "no_proxy")  # programs differ in which they read; what one says, both say
    said = [part.strip() for name in names for part in os.environ.get(name, "").split(",")]
    both = ",".join(dict.fromkeys([*filter(None, said), "127.0.0.1", "localhost"]))
    os.environ.update(dict.fromkeys(names, both))
