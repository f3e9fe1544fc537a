"""Scoring on two ranks that does not go well: python -m tests.support.failing_ranks MODEL OUT."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.calibration_samples import Samples
from nemo_minitron.models.ranks import join
from nemo_minitron.scoring.distributed_pass import (
    PassRequest,
    _Models,
    follow,
    leading,
    split_batches,
)
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.pass_in_memory import in_memory

MEASURES = Measures(("mean",), False, (1,), ())


def narrow(_, args):
    """Memory that suffices for one sample at once."""
    if len(args[0]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")


def full(_):
    """A disk that is full when rank 0 saves its sums."""
    raise OSError(28, "No space left on device")


def main(folder, out):
    ranks, samples = join("cpu"), Samples(torch.arange(4 * 13).view(4, 13) % 40)
    groups = split_batches(range(4), 2, ranks.size)
    model = _Models(ranks).get(folder, "cpu", sharded=True)
    scored = partial(
        in_memory, model, open_checkpoint(folder), samples, groups[ranks.rank], MEASURES
    )
    scored()
    hook = model.model.layers[0].register_forward_pre_hook(narrow)
    with pytest.raises(torch.OutOfMemoryError):  # and not halved by this rank alone
        scored()
    hook.remove()
    job = PassRequest(
        folder, samples, groups, MEASURES, frozenset(), "cpu", False, False, 10**9, out, None
    )  # fmt: skip
    said = ""
    try:
        if ranks.rank == 0:
            with leading(ranks) as lead:
                lead.run(job, full)
        else:
            follow(ranks)
    except (OSError, RuntimeError) as error:
        said = type(error).__name__
    (out / f"{ranks.rank}.json").write_text(json.dumps(said))
    os._exit(0)  # as a process that dies: the others hear of it


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
