"""From scores to the units that stay ([P1] section 2.3: rank, keep the top, in their original order)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_minitron.families import Family, evaluate

Keep = dict[str, Tensor]
"""Axis name to the kept units, int64, ascending: shape [kept] for the axes of scope ``model``, [layers of the
source, kept] for scope ``layer``, [layers, experts, kept] for scope ``expert``. An axis that keeps all its
units is absent; layers that do not have an axis keep its first units."""


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores along the last dimension, ascending.

    Of equals the lower index wins.

    Raises:
        ValueError: a score is not finite.
    """
    _check_finite(scores)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def least(scores: Tensor, gone: Sequence[int] = ()) -> int:
    """Place of the lowest score; of equals the later one.

    Args:
        scores: Tensor of shape [places].
        gone: places that no longer count, whatever their scores.

    Raises:
        ValueError: another score is not finite.
    """
    counts = torch.ones_like(scores, dtype=torch.bool)
    counts[list(gone)] = False
    _check_finite(scores[counts])
    left = scores.masked_fill(~counts, torch.inf)
    return left.numel() - 1 - int(left.flip(0).argmin())


def _check_finite(scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise ValueError(
            "importance scores contain NaN or infinity: the calibration pass overflowed"
        )


def top_within(scores_LU: Tensor, kept_groups_LG: Tensor, groups: int, per_group: int) -> Tensor:
    """Keeps the best units inside each kept group, the same number everywhere.

    Args:
        scores_LU: Tensor of shape [layers, units]; unit u belongs to group u // (units / groups).
        kept_groups_LG: Tensor of shape [layers, kept groups], ascending.
        groups: groups of the source model.
        per_group: units to keep in each.

    Returns:
        Tensor of shape [layers, kept groups x per_group], ascending.
    """
    size = scores_LU.shape[-1] // groups
    inside_LGK = top(scores_LU.unflatten(-1, (groups, size)), per_group)
    unit_LGK = inside_LGK + torch.arange(groups)[None, :, None] * size
    chosen = torch.gather(unit_LGK, 1, kept_groups_LG[..., None].expand(-1, -1, per_group))
    return chosen.flatten(1)


def score_shape(family: Family, sizes: Mapping[str, int], axis: str) -> tuple[int, ...]:
    """Shape of an axis' scores: [units], [layers, units] or [layers, experts, units]."""
    return (*(sizes[owner] for owner in family.ranked_per(axis)), sizes[axis])


def complete_targets(
    family: Family, sizes: Mapping[str, int], asked: Mapping[str, int], where: str = "plan"
) -> dict[str, int]:
    """Target size of every axis; an axis whose groups shrink keeps as many units in each group.

    An axis that follows others has the size that they give it.

    Args:
        family: the model's table.
        sizes: the source model's axis sizes.
        asked: the targets that were asked for.
        where: what an error message puts before the axis' name.

    Raises:
        ValueError: a target out of range, or units that cannot be spread evenly over their groups.
    """
    targets = {**sizes, **asked}
    for name, value in asked.items():
        if not 1 <= value <= sizes[name]:
            raise ValueError(
                f"{where}.{name}: expected 1 to {sizes[name]} (the source's size), found {value}"
            )
    for name, axis in family.axes.items():
        group = axis.within
        if group is None:
            continue
        inside = sizes[name] // sizes[group]
        if name not in asked and group in asked:
            targets[name] = targets[group] * inside
        if targets[name] % targets[group]:
            raise ValueError(
                f"{where}.{name}: expected a multiple of {group} = {targets[group]} "
                f"(every group keeps the same number), found {targets[name]}"
            )
        most = targets[group] * inside
        if targets[name] > most:
            raise ValueError(
                f"{where}.{name}: {targets[group]} {group} can keep at most {most} {name} "
                f"({inside} in each group of the source), found {targets[name]}"
            )
    complete = followed(family, targets)
    for name in asked:
        if complete[name] != asked[name]:
            raise ValueError(
                f"{where}.{name}: expected {complete[name]}, which is {family.axes[name].follows}, "
                f"found {asked[name]}"
            )
    return complete


def followed(family: Family, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes, with those that follow from others as these make them."""
    complete = dict(sizes)
    for name, axis in family.axes.items():
        if axis.follows is not None:
            complete[name] = evaluate(axis.follows, complete)
    return complete


def select_units(
    family: Family,
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    targets: Mapping[str, int],
) -> Keep:
    """Chooses the units of every axis that a plan shrinks.

    Args:
        family: the model's table.
        scores: axis name to scores, of ``score_shape``.
        sizes: the source model's axis sizes.
        targets: axis name to target size, for every axis.

    Returns:
        The kept units of every axis that shrinks.

    Raises:
        ValueError: scores for a shrinking axis are missing or not finite.
    """
    keep: Keep = {}
    outer = {axis.within for axis in family.axes.values() if axis.within}
    for name in sorted(targets, key=lambda name: name not in outer):
        axis = family.axes[name]
        if axis.fixed or (axis.follows is not None and name not in scores):
            continue  # in no tensor, or in none of this model
        inner = [a.name for a in family.axes.values() if a.within == name]
        shrinks = targets[name] < sizes[name]
        if axis.within and (shrinks or axis.within in keep):
            keep[name] = _select_within(
                axis.within, _scores(scores, name), keep, sizes, targets, name
            )
        elif shrinks and inner:
            grouped = group_scores(_scores(scores, inner[0]), sizes[name])
            keep[name] = top(grouped, targets[name])
        elif shrinks:
            keep[name] = top(_scores(scores, name), targets[name])
    return keep


def _select_within(
    group: str,
    scores_LU: Tensor,
    keep: Keep,
    sizes: Mapping[str, int],
    targets: Mapping[str, int],
    name: str,
) -> Tensor:
    every = torch.arange(sizes[group]).expand(scores_LU.shape[0], -1)
    kept = keep[group] if group in keep else every
    return top_within(scores_LU, kept, sizes[group], targets[name] // targets[group])


def _scores(scores: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in scores:
        raise ValueError(
            f"the scores hold no ranking for axis {name!r}; they hold {', '.join(sorted(scores)) or 'none'}; "
            "score.importance=magnitude ranks every axis"
        )
    return scores[name]


def kept_layers(layers: int, dropped: list[int]) -> list[int]:
    """The 0-based layers that remain, in order."""
    return [layer for layer in range(layers) if layer not in set(dropped)]


def contiguous(scores: Tensor, length: int) -> list[int]:
    """The least important block of consecutive layers; on a tie the later block.

    Args:
        scores: importance of every block of this length, by its first layer.
        length: layers in a block.

    Raises:
        ValueError: a score is not finite.
    """
    first = least(scores)
    return list(range(first, first + length))


def scattered(scores_L: Tensor, count: int) -> list[int]:
    """The ``count`` least important layers, wherever they are, ascending.

    On a tie the higher index is removed.

    Raises:
        ValueError: a score is not finite.
    """
    kept = top(scores_L, scores_L.numel() - count).tolist()
    return [layer for layer in range(scores_L.numel()) if layer not in kept]


def group_scores(heads_LU: Tensor, groups: int) -> Tensor:
    """Score of each KV group.

    The L2 norm over its query heads' scores. [layers, heads] to [layers, groups].
    """
    heads_LU = heads_LU.clamp(min=0)  # negative: removed in an earlier round
    norms: Tensor = torch.linalg.vector_norm(heads_LU.unflatten(-1, (groups, -1)), dim=-1)
    return norms
