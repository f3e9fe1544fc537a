"""Importance of a model's units from activations ([P1] section 2.2).

An activation score is two aggregations, first over the positions of each sample, then over samples.
What is kept between batches are the sums over samples of the first aggregation and of its square:
they merge associatively, so that any split of the samples over batches, ranks, machines or resumed
runs gives the score of the whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.losses.wide_matmul import widened

AGGREGATIONS = ("l2", "mean", "var")
OWN_TOKENS = "own_tokens"
"""Sum over the tokens that came to an expert; ``own_mean`` makes a mean over those of all samples of it."""


def over_sequence(x_BSU: Tensor, mask_BS: Tensor | None, hows: Sequence[str]) -> dict[str, Tensor]:
    """Aggregates each sample's activations over its valid positions, in float32.

    ``mean`` is the mean of |x|, ``l2`` is sqrt(sum x^2), ``var`` is the mean of (x - mean)^2 ([P1]
    section 2.2).

    Args:
        x_BSU: Tensor of shape [samples, positions, units].
        mask_BS: Tensor of shape [samples, positions], True where a position counts; None where all
            do.
        hows: any of ``AGGREGATIONS``.

    Returns:
        Each aggregation's Tensor of shape [samples, units], float32.
    """
    if mask_BS is None:
        count_B1 = torch.full((x_BSU.shape[0], 1), float(x_BSU.shape[1]), device=x_BSU.device)
    else:
        x_BSU = torch.where(
            mask_BS[..., None], x_BSU, torch.zeros((), dtype=x_BSU.dtype, device=x_BSU.device)
        )
        count_B1 = mask_BS.sum(1, keepdim=True).float().clamp(min=1)
    result = {}
    for how in hows:
        # written out: torch's vector_norm along a middle dimension takes ten times as long on a CPU
        if how == "mean":
            result[how] = x_BSU.abs().sum(1, dtype=torch.float32) / count_B1
        elif how == "l2":
            result[how] = x_BSU.float().square().sum(1).sqrt()
        else:
            assert how == "var", how
            mean_BU = x_BSU.sum(1, dtype=torch.float32) / count_B1
            deviation_BSU = x_BSU.float() - mean_BU[:, None]
            if mask_BS is not None:
                deviation_BSU = deviation_BSU * mask_BS[..., None]
            result[how] = deviation_BSU.square().sum(1) / count_B1
    return result


def over_routed(
    x_TU: Tensor, sample_T: Tensor, count_B: Tensor, hows: Sequence[str]
) -> dict[str, Tensor]:
    """``over_sequence`` for an expert, which sees a part of the positions; the others count as zeros.

    Args:
        x_TU: activations of the tokens that came to the expert, Tensor of shape [tokens, units].
        sample_T: the sample that each token belongs to, int64; their number where it does not count.
        count_B: valid positions of every sample.
        hows: any of ``AGGREGATIONS``, and ``OWN_TOKENS``.

    Returns:
        Each aggregation's Tensor of shape [samples, units], float32; of ``OWN_TOKENS`` float64.
    """
    x_TU = widened(x_TU)  # var is a difference of sums here
    sample_T, count_B = sample_T.to(x_TU.device), count_B.to(x_TU.device)
    samples = len(count_B)
    zero_BU = torch.zeros(samples + 1, x_TU.shape[1], dtype=torch.float64, device=x_TU.device)
    count_B1 = count_B.double().clamp(min=1)[:, None]
    result = {}
    for how in hows:
        if how == OWN_TOKENS:
            result[how] = zero_BU.index_add(0, sample_T, x_TU.abs())[:samples]
            continue
        if how == "mean":
            value_BU = zero_BU.index_add(0, sample_T, x_TU.abs())[:samples] / count_B1
        else:
            value_BU = zero_BU.index_add(0, sample_T, x_TU.square())[:samples]
            if how == "l2":
                value_BU = value_BU.sqrt()
            else:
                assert how == "var", how
                mean_BU = zero_BU.index_add(0, sample_T, x_TU)[:samples] / count_B1
                value_BU = (value_BU / count_B1 - mean_BU.square()).clamp(min=0)
        result[how] = value_BU.float()
    return result


def finished(part_PBKU: Tensor, how: str, count: int | Tensor) -> Tensor:
    """An aggregation over positions, from sums over parts of the positions.

    Args:
        part_PBKU: sums of |x| for ``mean``, of x^2 for ``l2``, of (x - mean)^2 for ``var``; float32
            of shape [places, samples, parts, units].
        how: one of ``AGGREGATIONS``.
        count: positions that count in every sample, or in each: Tensor of shape [samples, 1].

    Returns:
        Tensor of shape [places, samples, units], float32.
    """
    total_PBU = part_PBKU.sum(2)
    return total_PBU.sqrt() if how == "l2" else total_PBU / count


@dataclass(frozen=True)
class Moments:
    """Sums over samples of a per-sample value and of its square, float64, shape [..., units]."""

    samples: int
    total: Tensor
    squares: Tensor


def moments(value_BU: Tensor) -> Moments:
    """Moments of one batch of per-sample values of shape [samples, ..., units]."""
    value_BU = widened(value_BU)
    return Moments(value_BU.shape[0], value_BU.sum(0), value_BU.square().sum(0))


def merge(left: Moments, right: Moments) -> Moments:
    """Moments of two disjoint sets of samples together."""
    return Moments(
        left.samples + right.samples, left.total + right.total, left.squares + right.squares
    )


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


def own_mean(sums: Moments, count: Tensor) -> Tensor:
    """Mean over the tokens that came to each expert (REAP): one that few tokens need, and much, stays.

    Args:
        sums: of ``OWN_TOKENS``, shape [layers, experts].
        count: tokens that came to each, int64, of the same shape.

    Returns:
        Tensor of the same shape, float64; 0 where no token came.
    """
    return sums.total / count.clamp(min=1)


def random_scores(shape: tuple[int, ...], seed: int) -> Tensor:
    """Scores drawn uniformly from [0, 1): the baseline that every ranking must beat."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def concentration(scores: Tensor) -> float:
    """How unequal the units of an axis are: the Gini coefficient of their scores, 0 (all alike) to 1.

    Negative scores (of layers that do harm) count as 0.
    """
    ordered = scores.flatten().double().clamp(min=0).sort().values
    total = float(ordered.sum())
    if total == 0 or not math.isfinite(total):
        return 0.0
    rank = torch.arange(1, ordered.numel() + 1, dtype=torch.float64)
    return float((2 * rank - ordered.numel() - 1) @ ordered / (ordered.numel() * total))
