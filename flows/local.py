"""Runs the flow in this process, with Prefect's embedded server: nothing to install, nothing to start."""

import atexit
import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

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
        temporary = tempfile.mkdtemp(prefix="minitron-prefect-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)
    return folder


def run_here(config: Config, words: Sequence[str]) -> list[Result]:
    """Runs the whole pipeline, as the command line's ``words`` ask; returns what each stage reports."""
    prepare_environment()
    # a failure reaches the caller as an exception; Prefect's own log would print its traceback as
    # well
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from prefect import tags
    from prefect.settings import PREFECT_API_URL

    from nemo_minitron.flows.compress import compress

    if not PREFECT_API_URL.value():
        from nemo_minitron.flows.embedded_server import EmbeddedServer

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
