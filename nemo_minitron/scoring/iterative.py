"""Iterative importance ([P1] section 2.2, algorithm 1): score, cut a part of the way, score what is left.

Round i of T (from 0) cuts width d_s to d_s - (i + 1)(d_s - d_t) / T.
"""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.families import Family, check_sizes
from nemo_minitron.pruning.select import Keep, complete_targets, score_shape


def sizes_after(
    family: Family, source: Mapping[str, int], target: Mapping[str, int], round_: int, rounds: int
) -> dict[str, int]:
    """Sizes of all axes after a round: on the straight line, or the nearest valid sizes above it.

    Args:
        family: the model's table.
        source: its axis sizes.
        target: the sizes of the plan.
        round_: from 0.
        rounds: T.

    Raises:
        ValueError: no sizes between source and target satisfy the family.
    """
    shrinking = [axis for axis in source if target[axis] < source[axis] and axis != "layers"]
    options = []
    for axis in shrinking:
        line = source[axis] - (round_ + 1) * (source[axis] - target[axis]) / rounds
        step = math.gcd(
            source[axis], target[axis]
        )  # what divides both ends divides what lies between
        least = max(target[axis], math.ceil(line / step) * step)
        options.append([*range(least, source[axis] + 1, step)])
    for chosen in itertools.islice(_nearest_first(options), 100_000):
        sizes = {**source, **dict(zip(shrinking, chosen, strict=True))}
        try:
            complete = complete_targets(family, source, {axis: sizes[axis] for axis in shrinking})
            check_sizes(family, complete, "plan")
        except ValueError:
            continue
        return complete
    raise ValueError(
        f"score.iterations: no sizes of {family.model_type} between source and target are valid"
    )


def _nearest_first(options: list[list[int]]) -> "itertools.chain[tuple[int, ...]]":
    """Combinations of options, those with the smallest places in their lists first."""
    most = sum(len(option) - 1 for option in options)

    def of(total: int, rest: list[list[int]]) -> "list[tuple[int, ...]]":
        if not rest:
            return [()] if total == 0 else []
        return [
            (rest[0][place], *others)
            for place in range(min(total + 1, len(rest[0])))
            for others in of(total - place, rest[1:])
        ]

    return itertools.chain.from_iterable(of(total, options) for total in range(most + 1))


def spread(
    family: Family, sizes: Mapping[str, int], keep: Keep, axis: str, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of the units that are left, at their places among all of them, and which units are left.

    Args:
        family: the model's table.
        sizes: axis sizes of the whole model.
        keep: the units that are left, where an axis has shrunk.
        axis: the axis.
        scores: of the shape that the smaller model gives.

    Returns:
        Scores of the shape that the whole model gives, 0 elsewhere; a mask of the same shape.
    """
    full = torch.zeros(score_shape(family, sizes, axis), dtype=torch.float64)
    alive = torch.zeros_like(full, dtype=torch.bool)
    owners = family.ranked_per(axis)
    for place in itertools.product(*(range(size) for size in scores.shape[:-1])):
        source: tuple[int, ...] = ()
        for owner, number in zip(
            owners, place, strict=True
        ):  # an expert's number before experts were cut
            gone = keep.get(owner) if owner != "layers" else None
            source = (*source, number if gone is None else int(gone[source][number]))
        units = keep[axis][source] if axis in keep else torch.arange(sizes[axis])
        full[source][units] = scores[place].double()
        alive[source][units] = True
    return full, alive


def outranked(before: Tensor, now: Tensor, alive: Tensor) -> Tensor:
    """Joins the scores of a round with earlier ones: removed units rank below remaining ones.

    Args:
        before: scores of the round before, of the whole model.
        now: this round's, 0 where a unit is gone.
        alive: which units are left.

    Returns:
        This round's scores; below zero, in their old order, for the units that went before it.
    """
    gone_already = before < 0
    order = before.clamp(min=0) / before.amax(-1, keepdim=True).clamp(min=1e-30) * 0.5
    below = torch.where(gone_already, before - 1, order - 1)
    return torch.where(alive, now, below)
