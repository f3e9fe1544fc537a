"""A command on a machine that seems to have GPUs, none of which it may touch: python -m tests.support.with_gpus ..."""

import sys

import torch

from nemo_minitron.cli.main import main


def touched(*_):
    raise AssertionError("a GPU is taken")


if __name__ == "__main__":
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = touched
    sys.exit(main(sys.argv[1:]))
