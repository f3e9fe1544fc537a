"""Positions that count from 0 in every sample: nothing is to be found out about them on an accelerator.

transformers asks the positions, also those that it has made itself, whether several documents lie in a
sample, and waits for the answer: in every forward pass the accelerator runs dry.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import masking_utils

_ASKS = "find_packed_sequence_indices"


@contextlib.contextmanager
def positions_in_order(tokens_BS: Tensor, more: Mapping[str, Any]) -> Iterator[None]:
    """Lets a decoder's forward pass take its own positions for what they are, in the block.

    Args:
        tokens_BS: what it reads, Tensor of shape [batch, positions].
        more: its further arguments; with positions among them nothing changes, nor on the CPU, which
            knows the answer.
    """
    given = more.get("position_ids") is not None
    asks = getattr(masking_utils, _ASKS, None)
    if given or asks is None or tokens_BS.device.type == "cpu":
        yield
        return
    setattr(masking_utils, _ASKS, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, _ASKS, asks)
