"""Importance of a model's units from activations, weights or chance ([P1] section 2.2).

Shape suffixes: B samples, S positions, U units, H hidden channels, L layers; ``x_BSU`` has the shape
[samples, positions, units].

An activation score is two aggregations, first over the positions of each sample, then over samples. What is
kept
between batches are the sums over samples of the first aggregation and of its square: they merge
    associatively, so
that any split of the samples over batches, ranks, machines or resumed runs gives the score of the whole.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.families import Family, TensorRow
from nemo_minitron.families.grammar import Dim, dim_size, extent

AGGREGATIONS = ("l2", "mean", "var")


def over_sequence(x_BSU: Tensor, mask_BS: Tensor | None, how: str) -> Tensor:
    """Aggregates each sample's activations over its valid positions, in float32.

    ``mean`` is the mean of |x|, ``l2`` is sqrt(sum x^2), ``var`` is the mean of (x - mean)^2 ([P1] section
    2.2).

    Args:
        x_BSU: Tensor of shape [samples, positions, units].
        mask_BS: Tensor of shape [samples, positions], True where a position counts; None where all do.
        how: one of ``AGGREGATIONS``.

    Returns:
        Tensor of shape [samples, units], float32.
    """
    if mask_BS is None:
        count_B1 = torch.full((x_BSU.shape[0], 1), float(x_BSU.shape[1]), device=x_BSU.device)
    else:
        x_BSU = torch.where(
            mask_BS[..., None], x_BSU, torch.zeros((), dtype=x_BSU.dtype, device=x_BSU.device)
        )
        count_B1 = mask_BS.sum(1, keepdim=True).float().clamp(min=1)
    # written out: torch's vector_norm along a middle dimension takes ten times as long on a CPU
    if how == "mean":
        return x_BSU.abs().sum(1, dtype=torch.float32) / count_B1
    if how == "l2":
        return x_BSU.float().square().sum(1).sqrt()
    assert how == "var", how
    mean_BU = x_BSU.sum(1, dtype=torch.float32) / count_B1
    deviation_BSU = x_BSU.float() - mean_BU[:, None]
    if mask_BS is not None:
        deviation_BSU = deviation_BSU * mask_BS[..., None]
    return deviation_BSU.square().sum(1) / count_B1


@dataclass(frozen=True)
class Moments:
    """Sums over samples of a per-sample value and of its square, float64, shape [..., units]."""

    samples: int
    total: Tensor
    squares: Tensor


def moments(value_BU: Tensor) -> Moments:
    """Moments of one batch of per-sample values of shape [samples, units]."""
    value_BU = value_BU.double()
    return Moments(value_BU.shape[0], value_BU.sum(0), value_BU.square().sum(0))


def merge(left: Moments, right: Moments) -> Moments:
    """Moments of two disjoint sets of samples together."""
    return Moments(left.samples + right.samples, left.total + right.total, left.squares + right.squares)


def over_batch(sums: Moments, how: str) -> Tensor:
    """Aggregates per-sample values, given as sums, over all samples.

    Args:
        sums: moments of shape [..., units]; per-sample values are never negative.
        how: one of ``AGGREGATIONS``.

    Returns:
        Tensor of shape [..., units], float64.
    """
    if how == "l2":
        return sums.squares.sqrt()
    mean = sums.total / sums.samples
    if how == "mean":
        return mean
    assert how == "var", how
    return (sums.squares / sums.samples - mean.square()).clamp(min=0)


def cosine_sums(before_BSH: Tensor, after_BSH: Tensor, mask_BS: Tensor | None) -> tuple[float, int]:
    """Sum over valid tokens of cos(x_i, x_{i+1}), and their number.

    What block influence is made of ([P1] eq. 4).
    """
    before_BSH, after_BSH = before_BSH.float(), after_BSH.float()
    norms_BS = torch.linalg.vector_norm(before_BSH, dim=-1) * torch.linalg.vector_norm(after_BSH, dim=-1)
    cosine_BS = (before_BSH * after_BSH).sum(-1) / norms_BS.clamp(min=1e-12)
    if mask_BS is not None:
        cosine_BS = cosine_BS[mask_BS]
    return float(cosine_BS.double().sum()), cosine_BS.numel()


def group_scores(heads_LN: Tensor, groups: int) -> Tensor:
    """Score of each KV group.

    The L2 norm over its query heads' scores. [layers, heads] to [layers, groups].
    """
    norms: Tensor = torch.linalg.vector_norm(heads_LN.unflatten(-1, (groups, -1)), dim=-1)
    return norms


def unit_squares(
    tensor: Tensor, row: TensorRow, sizes: Mapping[str, int], family: Family, units: Mapping[str, int]
) -> dict[str, Tensor]:
    """Sum of squared weights of every unit that a tensor has weights of: the magnitude baseline.

    Args:
        tensor: weights of the shape that ``row`` states.
        row: the tensor's row in the family table.
        sizes: size of every axis.
        family: the table.
        units: the units that the tensor's name names (its layer, its expert).

    Returns:
        Axis name to sums, float64, for the prunable axes of the row and of the name: of shape [units],
        [extent of dimension 0, units] where dimension 0 is the axis whose units rank it each, or a scalar
        for the unit that the name names.
    """
    sums: dict[str, Tensor] = {}
    first = row.dims[0]
    for block, begin in _row_blocks(tensor):
        squares = block.float().square()
        for position, dim in enumerate(row.dims):
            each = position > 0 and _ranked_by(family, dim, first)
            others = [i for i in range(squares.dim()) if i != position and not (each and i == 0)]
            marginal = squares.sum(others, dtype=torch.float64) if others else squares.double()
            target = sums.setdefault(f"{position}", torch.zeros(
                *((tensor.shape[0],) if each else ()), tensor.shape[position], dtype=torch.float64,
            ))  # fmt: skip
            if position == 0 or each:
                target[begin : begin + len(block)] += marginal
            else:
                target += marginal
    result: dict[str, Tensor] = {}
    for position, dim in enumerate(row.dims):
        for axis, part in _by_axis(sums[f"{position}"], dim, sizes).items():
            if not family.axes[axis].fixed:
                result[axis] = result[axis] + part if axis in result else part
    total = sums["0"].sum()
    return {**result, **{family.indexed[name].name: total for name in units}}


_BLOCK = 2**22
"""Numbers squared at a time."""


def _row_blocks(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    step = max(1, _BLOCK // max(1, tensor[0].numel()))
    for begin in range(0, len(tensor), step):
        yield tensor[begin : begin + step], begin


def _ranked_by(family: Family, dim: Dim, first: Dim) -> bool:
    """Whether dimension 0 is the axis each of whose units ranks an axis of this dimension by itself."""
    axes = [axis for product in dim for axis in product if not axis.isdecimal()]
    return any(family.ranked_per(axis)[-1:] == first[0][:1] for axis in axes) and len(first) == 1


def _by_axis(marginal: Tensor, dim: Dim, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Sums of a dimension's marginal [..., extent] over everything but each of its axes: [..., units]."""
    result: dict[str, Tensor] = {}
    start = 0
    for product in dim:
        width = dim_size((product,), sizes)
        opened = marginal.narrow(-1, start, width).unflatten(-1, [extent(axis, sizes) for axis in product])
        for place, axis in enumerate(product):
            if not axis.isdecimal():
                others = [i - len(product) for i in range(len(product)) if i != place]
                part = opened.sum(others) if others else opened
                result[axis] = result[axis] + part if axis in result else part
        start += width
    return result


def random_scores(shape: tuple[int, ...], seed: int) -> Tensor:
    """Scores drawn uniformly from [0, 1): the baseline that every ranking must beat."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def concentration(scores: Tensor) -> float:
    """How unequal the units of an axis are: the Gini coefficient of their scores, 0 (all alike) to 1."""
    ordered = scores.flatten().double().sort().values
    total = float(ordered.sum())
    if total == 0 or not math.isfinite(total):
        return 0.0
    rank = torch.arange(1, ordered.numel() + 1, dtype=torch.float64)
    return float((2 * rank - ordered.numel() - 1) @ ordered / (ordered.numel() * total))
