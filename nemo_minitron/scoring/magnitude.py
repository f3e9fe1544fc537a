"""Importance of units from their weights alone: the magnitude baseline, which needs no data."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from nemo_minitron.families import Architecture, Family, TensorRow, find_row
from nemo_minitron.families.grammar import Dim, extent, segments
from nemo_minitron.pruning.select import score_shape


def magnitudes(
    model: Architecture, names: Iterable[str], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """L2 norm of each unit's weights, one tensor in memory at a time; of a layer, that of all its weights.

    Args:
        model: what the tensors belong to.
        names: names of its tensors.
        read: reads one of them.

    Returns:
        Axis name to scores, float64, of ``score_shape``, for every axis that scores rank.
    """
    family, sizes = model.family, model.sizes
    squares = {
        axis: torch.zeros(score_shape(family, sizes, axis), dtype=torch.float64)
        for axis in model.prunable
    }
    for name in names:
        found = find_row(family, name)
        if found is None:
            continue
        row, units = found
        for axis, part in unit_squares(read(name), row, sizes, family, units).items():
            squares[axis][_place(family, axis, units)] += part
    return {axis: total.sqrt() for axis, total in squares.items()}


def _place(family: Family, axis: str, units: Mapping[str, int]) -> tuple[int, ...]:
    """Where a tensor's share of an axis' scores belongs: in its layer, in its expert, at its unit."""
    numbers = [
        units.get(family.axes[name].index or "") for name in (*family.ranked_per(axis), axis)
    ]
    return tuple(number for number in numbers if number is not None)


def unit_squares(
    tensor: Tensor,
    row: TensorRow,
    sizes: Mapping[str, int],
    family: Family,
    units: Mapping[str, int],
) -> dict[str, Tensor]:
    """Sum of squared weights of every unit that a tensor has weights of: the magnitude baseline.

    Args:
        tensor: weights of the shape that ``row`` states.
        row: the tensor's row in the family table.
        sizes: size of every axis.
        family: the table.
        units: the units that the tensor's name names (its layer, its expert).

    Returns:
        Axis name to sums, float64, for the prunable axes of the row and of the name: of shape
            [units],
        [extent of dimension 0, units] where dimension 0 is the axis whose units rank it each, or a
        scalar for the unit that the name names.
    """
    if not row.dims:  # a scalar belongs to no unit but those that the name names
        square = tensor.double().square()
        return {family.indexed[name].name: square for name in units}
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
            if axis in family.prunable:
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
    for product, start, width in segments(dim, sizes):
        opened = marginal.narrow(-1, start, width).unflatten(
            -1, [extent(axis, sizes) for axis in product]
        )
        for place, axis in enumerate(product):
            if not axis.isdecimal():
                others = [i - len(product) for i in range(len(product)) if i != place]
                part = opened.sum(others) if others else opened
                result[axis] = result[axis] + part if axis in result else part
    return result
