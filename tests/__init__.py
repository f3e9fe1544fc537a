"""The tests, and the environment that all of them run in: nothing is fetched, nobody is told."""

import atexit
import os
import shutil
import signal
import tempfile

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
if "PREFECT_HOME" not in os.environ:  # the first process; workers inherit the folder
    _HOME, _OWNER = tempfile.mkdtemp(prefix="minitron-tests-prefect-"), os.getpid()
    os.environ["PREFECT_HOME"] = _HOME
    atexit.register(lambda: os.getpid() == _OWNER and shutil.rmtree(_HOME, ignore_errors=True))

# a shell that starts something in the background lets it ignore SIGINT, which all processes below inherit
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("tests.support")
