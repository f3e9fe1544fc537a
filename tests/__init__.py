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
if "PREFECT_HOME" not in os.environ:
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="minitron-prefect-")
    atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)

# a shell that starts something in the background lets it ignore SIGINT, which all processes below inherit
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("tests.support")
