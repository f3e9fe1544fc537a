"""Runs tests of Triton's kernels where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run_interpreted(cases: Path) -> None:
    """Runs a file of tests in a process of its own: in Triton's interpreter, or on the GPU if there is one.

    Triton decides when it is imported, and other tests may have imported it.
    """
    pytest.importorskip("triton")
    words = [
        sys.executable,
        "-m",
        "pytest",
        str(cases),
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    wish = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    found = subprocess.run(words, env={**os.environ, **wish}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
