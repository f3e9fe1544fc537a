"""Iterative importance ([P1] section 2.2, algorithm 1): score, cut a part of the way, score what is left.

Round i of T (from 0) cuts width d_s to d_s - (i + 1)(d_s - d_t) / T.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nemo_minitron.families import Family, check_sizes
from nemo_minitron.families.grammar import names_in
from nemo_minitron.pruning.select import Keep, complete_targets, score_shape

_TRIED = 100_000  # combinations of sizes that depend on each other


def sizes_after(
    family: Family, source: Mapping[str, int], target: Mapping[str, int], round_: int, rounds: int
) -> dict[str, int]:
    """Sizes of all axes after a round: on the straight line, or the nearest valid sizes above it.

    Nearest by the share of an axis' way that a size is above the line.

    Args:
        family: the model's table.
        source: its axis sizes.
        target: the sizes of the plan.
        round_: from 0.
        rounds: T.

    Raises:
        ValueError: no sizes between source and target satisfy the family.
    """
    chosen: dict[str, int] = {}
    for axes in _tied(family, source, target):
        ways = [source[axis] - target[axis] for axis in axes]
        lines = [  # rounded up
            source[axis] - (round_ + 1) * way // rounds
            for axis, way in zip(axes, ways, strict=True)
        ]
        options = [range(line, source[axis] + 1) for axis, line in zip(axes, lines, strict=True)]
        for sizes in itertools.islice(_nearest_first(options, ways), _TRIED):
            asked = dict(zip(axes, sizes, strict=True))
            try:
                check_sizes(family, complete_targets(family, source, asked), "plan")
            except ValueError:
                continue
            chosen |= asked
            break
        else:
            raise ValueError(
                f"score.iterations: no sizes of {family.model_type} between source and target are valid"
                f" for {', '.join(axes)}"
            )
    return complete_targets(family, source, chosen)


def _tied(family: Family, source: Mapping[str, int], target: Mapping[str, int]) -> list[list[str]]:
    """The axes that shrink, those that a rule of the family names together in one list."""
    rules = [names_in(constraint) for constraint in family.constraints]
    for name, axis in family.axes.items():
        rules += [{name, axis.within}] if axis.within else []
        rules += [{name, *names_in(axis.follows)}] if axis.follows else []
    groups = [{axis} for axis in source]
    for rule in rules:
        joined = [group for group in groups if group & rule]
        groups = [group for group in groups if not group & rule] + [set().union(*joined)]
    shrinking = [axis for axis in source if target[axis] < source[axis] and axis != "layers"]
    lists = [[axis for axis in shrinking if axis in group] for group in groups]
    return [axes for axes in lists if axes]


def _nearest_first(options: Sequence[Sequence[int]], ways: Sequence[int]) -> Iterator[list[int]]:
    """Combinations of options, those first whose places in their lists are the smallest share of the ways."""
    waiting: list[tuple[float, int, tuple[int, ...]]] = [(0, 0, (0,) * len(options))]
    while waiting:
        _, last, places = heapq.heappop(waiting)
        yield [option[place] for option, place in zip(options, places, strict=True)]
        for axis in range(last, len(options)):  # each combination is reached once
            further = (*places[:axis], places[axis] + 1, *places[axis + 1 :])
            if further[axis] < len(options[axis]):
                share = math.fsum(place / way for place, way in zip(further, ways, strict=True))
                heapq.heappush(waiting, (share, axis, further))


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
