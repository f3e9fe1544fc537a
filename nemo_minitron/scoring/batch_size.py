"""How many samples a scoring pass reads at once, where the user leaves it open.

The scores do not depend on it. A GPU needs many tokens at once: with few, launching kernels takes
longer than computing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config.score_config import USUAL_BATCH
from nemo_minitron.data.calibration_samples import Samples
from nemo_minitron.models.causal_lm import free
from nemo_minitron.models.free_memory import available_bytes
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.pass_in_memory import in_memory

TOKENS = 65_536
"""More tokens at once gain nothing: kernels take far longer than their launches already."""
SHARE = 0.6
"""Of the free memory: fragments, and batches whose documents take another path, need some."""


@dataclass(frozen=True)
class Need:
    """Bytes of a forward pass that is scored: of one sample, and of two."""

    one: int
    two: int


def samples_at_once(setting: int | str) -> int:
    """The number that ``score.batch_size`` gives; ``auto`` is ``USUAL_BATCH`` until a GPU was asked.

    Raises:
        ValueError: another word.
    """
    if setting == "auto":
        return USUAL_BATCH
    if isinstance(setting, str):
        raise ValueError(f"score.batch_size: expected auto or a number, found {setting!r}")
    return setting


def largest(need: Need, available: int, positions: int, samples: int) -> int:
    """The largest power of two that memory, ``TOKENS`` and the number of samples leave room for.

    Args:
        need: what one and two samples took.
        available: bytes that are free.
        positions: of each sample.
        samples: that there are to read.
    """
    each = max(need.two - need.one, 1)
    size = 1
    while (
        size < samples
        and 2 * size * positions <= max(TOKENS, positions)
        and need.one + (2 * size - 1) * each <= SHARE * available
    ):
        size *= 2
    return size


def fitting(
    model: Any, checkpoint: Checkpoint, samples: Samples, indices: Sequence[int], measures: Measures
) -> tuple[int, str]:
    """The number of samples for a model on a GPU, from what one and two take there; and a line that says so.

    Args:
        model: the causal LM, on CUDA.
        checkpoint: where it came from.
        samples: the calibration samples.
        indices: those that one rank is to read, at most.
        measures: what to sum.
    """
    device, positions = next(model.parameters()).device, samples.tokens_NS.shape[1] - 1
    free()
    try:
        # the first also loads kernels and their workspaces, which stay
        taken = [_peak(model, checkpoint, samples, indices[:n], measures) for n in (1, 1, 2)]
    except torch.OutOfMemoryError:
        size, why = 1, "two do not fit"
    else:
        available = available_bytes(device)
        size = largest(Need(*taken[1:]), available, positions, len(indices))
        each = (taken[2] - taken[1]) / 1e9
        why = f"each takes {each:.2f} GB, {available / 1e9:.1f} GB are free"
    free()
    return size, f"score.batch_size: auto, {size} samples of {positions} tokens at once ({why})"


def _peak(
    model: Any, checkpoint: Checkpoint, samples: Samples, group: Sequence[int], measures: Measures
) -> int:
    """Bytes by which a pass over a few samples raises what PyTorch holds on the model's GPU."""
    device = next(model.parameters()).device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    in_memory(model, checkpoint, samples, [group], measures)
    peak = torch.cuda.max_memory_allocated(device) - before
    free()
    return peak
