"""Where the kept units of axes lie along a dimension of a tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.families.grammar import Dim, extent, segments


def dim_index(dim: Dim, sizes: Mapping[str, int], keep: Mapping[str, Tensor]) -> Tensor | None:
    """Positions along one dimension that survive, or None where all do.

    Args:
        dim: the dimension's products of axes.
        sizes: size of every axis in the source model.
        keep: axis name to kept units, shape [kept].

    Returns:
        Tensor of shape [surviving positions], int64, ascending if every kept list is.
    """
    if not any(axis in keep for product in dim for axis in product):
        return None
    parts = []
    for product, start, _ in segments(dim, sizes):
        index = torch.zeros(1, dtype=torch.int64)
        for axis in product:
            units = keep[axis] if axis in keep else torch.arange(extent(axis, sizes))
            index = (index[:, None] * extent(axis, sizes) + units[None, :]).flatten()
        parts.append(index + start)
    return torch.cat(parts)
