"""Trainings on two ranks, and what is compared of them."""

import sys

from safetensors.torch import load_file

from nemo_minitron.workspace.training_log import read_log


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
            "nemo_minitron", *arguments]  # fmt: skip


def curve(place):
    lines = read_log(place / "student" / "metrics.jsonl")
    clocked = ("tokens_per_second", "tflops")
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def weights(place):
    return load_file(place / "student" / "hf" / "model.safetensors")
