"""Runs tests of Triton's kernels, and builds them for cards, where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CARDS = {"Hopper": 90, "Blackwell": 100}
"""Compute capabilities."""


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
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    wish = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    found = subprocess.run(words, env={**os.environ, **wish}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def built(kernel: Any, card: str, constants: dict[str, Any], types: dict[str, str]) -> bytes:
    """A kernel's machine code for a card, made by Triton and NVIDIA's assembler; neither needs the card.

    Args:
        kernel: a function of ``triton.jit``.
        card: a key of ``CARDS``.
        constants: its ``tl.constexpr`` parameters.
        types: of its other parameters, Triton's names; an integer where nothing is said.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=values)
    target = GPUTarget("cuda", CARDS[card], 32)
    code: bytes = triton.compile(source, target=target, options={"num_warps": 8}).asm["cubin"]
    return code
