"""All units of a model in the order of their importance: a smaller model is then the beginning of each axis.

A model whose units stand in another order computes the same (the proofs of the family tables), and what
``select_units`` keeps are the first units of that order. So one sorted copy of the weights holds every
model that a plan can name.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_minitron.families import Family
from nemo_minitron.pruning.select import Keep, group_scores, score_shape


def importance_order(
    family: Family, scores: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Keep:
    """All units of every axis that the scores rank, the most important first.

    Units stay inside their group, groups move whole; of equals the lower index comes first, as in
    ``select_units``.

    Args:
        family: the model's table.
        scores: axis name to scores, of ``score_shape``.
        sizes: the model's axis sizes.

    Returns:
        Axis name to an order, a permutation along the last dimension; the shapes are those of the
        scores. Axes without scores keep their order, and are absent.

    Raises:
        ValueError: scores that are not finite.
    """
    keep: Keep = {}
    outer = {axis.within for axis in family.axes.values() if axis.within}
    names = [name for name in family.axes if not family.axes[name].fixed and name != "layers"]
    for name in sorted(names, key=lambda name: name not in outer):
        axis = family.axes[name]
        inner = [other.name for other in family.axes.values() if other.within == name]
        if axis.within is not None:
            if name in scores or axis.within in keep:
                shape = score_shape(family, sizes, name)
                own = scores[name] if name in scores else torch.zeros(shape)
                keep[name] = _inside_groups(own, keep.get(axis.within), sizes[axis.within])
        elif inner and inner[0] in scores:
            keep[name] = _falling(group_scores(_finite(scores[inner[0]]), sizes[name]))
        elif not inner and name in scores:
            keep[name] = _falling(_finite(scores[name]))
    return keep


def _inside_groups(scores: Tensor, groups: Tensor | None, count: int) -> Tensor:
    """The order of units that lie in groups: group by group, in each the most important first."""
    inside = scores.shape[-1] // count
    order = _falling(_finite(scores).unflatten(-1, (count, inside)))
    order = order + torch.arange(count)[:, None] * inside
    if groups is not None:
        order = order.gather(-2, groups[..., None].expand(order.shape))
    return order.flatten(-2)


def _finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise ValueError(
            "importance scores contain NaN or infinity: the calibration pass overflowed"
        )
    return scores


def _falling(scores: Tensor) -> Tensor:
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def beginnings(
    family: Family, order: Keep, sizes: Mapping[str, int], targets: Mapping[str, int]
) -> Keep:
    """The units of a sorted model that stay: the first of each axis, of grouped ones the first of each group.

    Args:
        family: the model's table.
        order: what ``importance_order`` gave.
        sizes: the model's axis sizes.
        targets: axis name to target size, for every axis.

    Returns:
        Axis name to kept units, shape [kept], the same in every layer; axes that keep all are absent.

    Raises:
        ValueError: an axis shrinks that the scores do not rank.
    """
    keep: Keep = {}
    for name, axis in family.axes.items():
        group, whole = axis.within, targets[name] == sizes[name]
        if axis.fixed or name == "layers" or (axis.follows is not None and name not in order):
            continue
        if whole and (group is None or targets[group] == sizes[group]):
            continue
        if name not in order:
            raise ValueError(
                f"the scores hold no ranking for axis {name!r}; they order "
                f"{', '.join(sorted(order)) or 'none'}; score.importance=magnitude ranks every axis"
            )
        if group is None:
            keep[name] = torch.arange(targets[name])
            continue
        inside, each = sizes[name] // sizes[group], targets[name] // targets[group]
        starts = torch.arange(targets[group])[:, None] * inside
        keep[name] = (starts + torch.arange(each)).flatten()
    return keep
