"""Importance of layers, and of blocks of consecutive layers, by the cost of removing them.

``block_influence`` of the block i .. i+n-1 is 1 - E[cos(x_i, x_{i+n})], x_i the input of layer i
([P1] eq. 4, which has n = 1). ``lm_loss`` is the rise of the language-model loss without the block,
``task`` the fall of a task's accuracy ([P2] section 3). Each is a sum over tokens (or questions),
and sums merge.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("block_influence", "lm_loss", "task")


@dataclass(frozen=True)
class DepthSums:
    """Sums of one metric for all blocks of one length.

    Attributes:
        total: float64, shape [layers - length + 1]: cosines, losses without the block, or right
            answers without it.
        base: the same sum for the whole model; 0 for cosines.
        count: tokens (questions of a task) that were summed over.
    """

    total: Tensor
    base: float
    count: int


def merge_depth(left: DepthSums, right: DepthSums) -> DepthSums:
    """Sums of two disjoint sets of samples together."""
    return DepthSums(left.total + right.total, left.base + right.base, left.count + right.count)


def block_importance(metric: str, sums: DepthSums) -> Tensor:
    """Importance of each block.

    Returns:
        Tensor of shape [layers - length + 1], float64; 0 for a block that changes nothing, less
        than 0 for one that does harm.
    """
    if metric == "block_influence":
        return 1 - sums.total / sums.count
    change = (sums.total - sums.base) / sums.count
    return -change if metric == "task" else change


def cosines(before_BSH: Tensor, after_BSH: Tensor) -> Tensor:
    """cos(x_i, x_{i+n}) at every position, float32, Tensor of shape [samples, positions]."""
    before_BSH, after_BSH = before_BSH.float(), after_BSH.float()
    norms_BS = torch.linalg.vector_norm(before_BSH, dim=-1) * torch.linalg.vector_norm(
        after_BSH, dim=-1
    )
    cosine_BS: Tensor = (before_BSH * after_BSH).sum(-1) / norms_BS.clamp(min=1e-12)
    return cosine_BS
