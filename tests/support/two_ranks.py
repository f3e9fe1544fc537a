"""Trainings on two ranks, and what is compared of them."""

import subprocess
import sys

from safetensors.torch import load_file

from nemo_minitron.workspace.training_log import read_log
from tests.support.processes import free_port, until
from tests.support.runs import kill_group, started


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
            "nemo_minitron", *arguments]  # fmt: skip


def curve(place):
    lines = read_log(place / "student" / "metrics.jsonl")
    clocked = ("tokens_per_second", "tflops")
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def weights(place):
    return load_file(place / "student" / "hf" / "model.safetensors")


def on_two_ranks(*arguments, seconds=120):
    """Runs a command on two ranks, told of each other as torchrun would tell them; exit codes and what they printed.

    Where one fails the other is ended, which would wait for it.
    """
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    ranks = [
        started(*arguments, env={**shared, "RANK": number, "LOCAL_RANK": number}) for number in "01"
    ]
    try:
        until(
            lambda: all(r.poll() is not None for r in ranks) or any(r.poll() for r in ranks),
            seconds, 0.05,
        )  # fmt: skip
    finally:
        failed = [rank for rank in ranks if rank.poll()]
        for rank in ranks:
            if rank.poll() is None:
                kill_group(rank)
    printed = [rank.communicate() for rank in failed or ranks]
    codes = [rank.returncode for rank in failed or ranks]
    return subprocess.CompletedProcess(
        arguments, max(codes, key=abs), *("".join(texts) for texts in zip(*printed, strict=True))
    )
