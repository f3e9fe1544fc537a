"""Trainings on two ranks, and what is compared of them."""

import os
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


def environments():
    """Of two processes, what torchrun would tell them of each other."""
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    return [{**shared, "RANK": number, "LOCAL_RANK": number} for number in "01"]


def two_ranks(*arguments):
    """A command at work on two ranks."""
    return [started(*arguments, env=environment) for environment in environments()]


def module_on_two_ranks(*arguments, seconds=240):
    """Runs ``python -m ARGUMENTS`` on two ranks, which have to end well."""
    command = [sys.executable, "-m", *map(str, arguments)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **own}, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for own in environments()
    ]  # fmt: skip
    done = _together(ranks, arguments, seconds)
    assert done.returncode == 0, done.stderr[-5000:]


def on_two_ranks(*arguments, seconds=120):
    """Runs a command on two ranks: the first exit code that is not 0, and what they printed.

    Where one fails the other is ended, as torchrun does: it would wait for it.
    """
    return _together(two_ranks(*arguments), arguments, seconds)


def _together(ranks, arguments, seconds):
    def over():
        codes = [rank.poll() for rank in ranks]
        return any(codes) or None not in codes

    try:
        until(over, seconds, 0.05)
    finally:
        code = next((rank.poll() for rank in ranks if rank.poll()), 0)
        for rank in ranks:
            if rank.poll() is None:
                kill_group(rank)
    texts = zip(*(rank.communicate() for rank in ranks), strict=True)
    printed = ["".join(text or "" for text in both) for both in texts]
    return subprocess.CompletedProcess(arguments, code, *printed)
