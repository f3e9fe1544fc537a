"""NumPy: every combination of sizes at once: which the family allows, what each costs, which fit a budget.

A constraint of a family names two or three axes. It is evaluated for the sizes of these alone, and the
answers are spread over the whole grid; so are the costs. A million combinations take a second or two.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.families import Architecture
from nemo_minitron.families.grammar import evaluate, names_in
from nemo_minitron.pruning.budget import BITS
from nemo_minitron.pruning.cost import count_tensors, sums
from nemo_minitron.pruning.size_search import checked_choices
from nemo_minitron.pruning.slice import Cut

MOST = 2_000_000
"""Combinations looked at; their sizes and costs are held in memory."""
Latency = Callable[[Sequence[int], Mapping[str, Any]], Any]
"""Milliseconds of one pass, of kept layers and sizes (arrays that broadcast together)."""
Grid = dict[str, Any]
"""Axis name to sizes, arrays that broadcast together."""


@dataclass(frozen=True)
class Terms:
    """What costs are counted for.

    Attributes:
        dtype, cache_dtype: of weights and KV cache, of ``BITS``.
        batch, context: sequences at a time, and tokens of each.
        latency: what one pass takes; None: latency is no cost here.
    """

    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    batch: int = 1
    context: int = 4096
    latency: Latency | None = None


@dataclass(frozen=True)
class Space:
    """Combinations of sizes that a family allows.

    Attributes:
        before: the source's sizes.
        choices: axis name to the sizes tried, ascending, in the order of the columns of ``places``.
        places: number of each axis' choice, Array of shape [combinations, axes].
        sizes: axis name to size, of the axes that change somewhere, Arrays of shape [combinations].
        costs: measure to cost, Arrays of shape [combinations].
        refusal: why a combination that was left out is not allowed; empty: none was.
    """

    before: Mapping[str, int]
    choices: Mapping[str, Sequence[float]]
    places: NDArray[np.int64]
    sizes: Mapping[str, NDArray[np.int64]]
    costs: Mapping[str, NDArray[np.float64]]
    refusal: str = ""
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> dict[str, int]:
        """Sizes of one combination: of the axes that were asked for or that change."""
        found = {name: int(column[index]) for name, column in self.sizes.items()}
        asked = {"ffn" if name == "expansion" else name for name in self.choices}
        return {n: v for n, v in found.items() if n in asked or v != self.before[n]}

    def cost(self, index: int) -> dict[str, float]:
        """Costs of one combination."""
        return {name: float(column[index]) for name, column in self.costs.items()}


def costs_of(
    counts: Any, sizes: Mapping[str, Any], layers: Sequence[int], terms: Terms
) -> dict[str, Any]:
    """Costs of one model, or of many where sizes are arrays."""
    found = sums(counts, sizes, terms.context, BITS[terms.cache_dtype] / 8)
    found["weight_bytes"] = found["parameters"] * (BITS[terms.dtype] / 8)
    cache = found["kv_bytes_per_token"] * terms.batch * terms.context
    found["memory_bytes"] = found["weight_bytes"] + cache
    if terms.latency is not None:
        found["latency_ms"] = terms.latency(layers, sizes)
    return found


def source_costs(model: Architecture, terms: Terms) -> dict[str, float]:
    """What the model itself costs."""
    every = range(model.sizes["layers"])
    found = costs_of(count_tensors(model), model.sizes, every, terms)
    return {name: float(value) for name, value in found.items()}


def size_space(
    model: Architecture,
    choices: Mapping[str, Sequence[float]],
    terms: Terms,
    keep_layers: Callable[[int], Sequence[int]] = range,
    where: str = "search",
) -> Space:
    """All combinations of sizes that the family allows, with their costs.

    Args:
        model: the model that is cut.
        choices: axis name to the sizes to try, ``expansion`` to ratios ffn / hidden.
        terms: what costs are counted for.
        keep_layers: which 0-based layers stay of a model cut to so many; by default the first.
        where: what error messages put before the axis' name.

    Raises:
        ValueError: what is asked for cannot be; no combination that the family allows.
    """
    grid = checked_choices(model, choices, where, MOST)
    conditions = set().union(*(names_in(row.when) for row in model.family.rows if row.when))
    decisive = [
        name for name in grid
        if name == "layers" or conditions & set(model.family.axes[_axis(name)].config)
    ]  # fmt: skip
    blocks, kept = [], dict[int, tuple[int, ...]]()
    refusals: list[str] = []
    for fixed in itertools.product(*(range(len(grid[name])) for name in decisive)):
        chosen = dict(zip(decisive, fixed, strict=True))
        layers = int(grid["layers"][chosen["layers"]])
        try:
            kept[layers] = tuple(keep_layers(layers))
            model.check_layers(kept[layers], where)
        except ValueError as error:
            refusals.append(str(error))
            continue
        blocks.append(_block(model, grid, chosen, kept[layers], terms, refusals))
    full = [block for block in blocks if len(block[0])]
    if not full:
        last = refusals[-1] if refusals else "none"
        raise ValueError(
            f"{where}: expected sizes that fit each other, found none; the last: {last}"
        )
    places, sizes, costs = zip(*full, strict=True)
    return Space(
        model.sizes, grid, np.concatenate(places),
        {name: np.concatenate([each[name] for each in sizes]) for name in sizes[0]},
        {name: np.concatenate([each[name] for each in costs]) for name in costs[0]},
        refusals[-1] if refusals else "", kept,
    )  # fmt: skip


def _axis(name: str) -> str:
    return "ffn" if name == "expansion" else name


def _block(
    model: Architecture,
    grid: Mapping[str, Sequence[float]],
    chosen: Mapping[str, int],
    kept: tuple[int, ...],
    terms: Terms,
    refusals: list[str],
) -> tuple[NDArray[np.int64], dict[str, Any], dict[str, Any]]:
    """The combinations in which the decisive axes have one size each: places, sizes and costs."""
    names = list(grid)
    arrays: Grid = {}
    numbers: Grid = {}
    for position, name in enumerate(names):
        every = range(len(grid[name])) if name not in chosen else [chosen[name]]
        shape = [-1 if i == position else 1 for i in range(len(names))]
        numbers[name] = np.array(list(every), dtype=np.int64).reshape(shape)
        arrays[name] = np.array([grid[name][i] for i in every]).reshape(shape)
    sizes, allowed = _completed(model, arrays)
    for rule in model.family.constraints:
        holds = _spread(rule, sizes)
        allowed = allowed & holds
        if not np.all(holds):
            refusals.append(f"{model.family.model_type} needs {rule}")
    decided = {name: int(np.asarray(sizes[name]).flat[0]) for name in map(_axis, chosen)}
    counts = count_tensors(Cut(model, {}, kept).result.resized({**model.sizes, **decided}))
    costs = costs_of(counts, sizes, kept, terms)
    whole = tuple(len(numbers[name].ravel()) for name in names)
    mask = np.broadcast_to(allowed, whole).ravel()

    def flat(value: Any, dtype: Any) -> Any:
        return np.broadcast_to(value, whole).ravel()[mask].astype(dtype)

    places = np.stack([flat(numbers[name], np.int64) for name in names], axis=1)
    varying = [n for n in sizes if n in map(_axis, names) or np.any(sizes[n] != model.sizes[n])]
    # the same columns in every block: what an axis inside or behind a chosen one may become
    moved = [n for n in sizes if n in varying or _may_move(model, n, set(map(_axis, names)))]
    return (
        places,
        {name: flat(sizes[name], np.int64) for name in moved},
        {name: flat(value, np.float64) for name, value in costs.items()},
    )


def _may_move(model: Architecture, name: str, chosen: set[str]) -> bool:
    axis = model.family.axes[name]
    return axis.within in chosen or axis.follows is not None


def _completed(model: Architecture, arrays: Grid) -> tuple[Grid, Any]:
    """Sizes of every axis, and where they can be: what ``complete_targets`` does, for arrays."""
    family, before = model.family, model.sizes
    sizes: Grid = {name: np.int64(size) for name, size in before.items()}
    allowed: Any = np.True_
    asked = {_axis(name) for name in arrays}
    sizes |= {name: each for name, each in arrays.items() if name != "expansion"}
    if "expansion" in arrays:
        ffn = arrays["expansion"] * sizes["hidden"]
        whole = np.rint(ffn)
        allowed = (
            np.isclose(ffn, whole, rtol=1e-6, atol=0) & (whole >= 1) & (whole <= before["ffn"])
        )
        sizes["ffn"] = whole.astype(np.int64)
    for name, axis in family.axes.items():
        group = axis.within
        if group is None:
            continue
        inside = before[name] // before[group]
        if name not in asked and group in asked:
            sizes[name] = sizes[group] * inside
        allowed = allowed & (sizes[name] % sizes[group] == 0)
        allowed = allowed & (sizes[name] <= sizes[group] * inside)
    for name, axis in family.axes.items():
        if axis.follows is not None:
            size = _spread(axis.follows, sizes)
            allowed = allowed & (size == sizes[name]) if name in asked else allowed
            sizes[name] = size
    return sizes, allowed


def _spread(expression: str, sizes: Grid) -> Any:
    """An expression over axes, evaluated once for all sizes of the axes that it names."""
    names = sorted(names_in(expression))
    columns = np.broadcast_arrays(*(np.asarray(sizes[name]) for name in names))
    shape = columns[0].shape if columns else ()
    found = [
        evaluate(expression, {n: int(c[index]) for n, c in zip(names, columns, strict=True)})
        for index in np.ndindex(shape)
    ]
    return np.array(found).reshape(shape)


Limits = Mapping[str, tuple[float, float]]
"""Measure to the least and the most that is allowed."""


def within(space: Space, limits: Limits, where: str) -> NDArray[np.int64]:
    """The combinations that keep every limit.

    Raises:
        ValueError: none does; the message names the nearest.
    """
    inside = np.ones(len(space), dtype=bool)
    excess = np.zeros(len(space))
    for measure, (least, most) in limits.items():
        cost = space.costs[measure]
        inside &= (cost >= least) & (cost <= most)
        over = cost / most - 1 if math.isfinite(most) else np.zeros(len(space))
        excess = np.maximum(excess, np.maximum(over, least / np.maximum(cost, 1) - 1))
    if inside.any():
        return np.flatnonzero(inside)
    near = int(np.argmin(excess))
    costs = ", ".join(f"{name} {space.costs[name][near]:,.6g}" for name in limits)
    sizes = ", ".join(f"{name}={size}" for name, size in space.at(near).items())
    asked = ", ".join(_said(name, *limit) for name, limit in limits.items())
    raise ValueError(
        f"{where}: expected {asked}; none of {len(space):,} sizes keeps that; nearest: {costs} ({sizes})"
    )


def _said(measure: str, least: float, most: float) -> str:
    if least <= 0:
        return f"{measure} of at most {most:,.10g}"
    return f"{measure} of {least:,.10g}" + (
        f" to {most:,.10g}" if math.isfinite(most) else " or more"
    )


def front(space: Space, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the combinations that no other one exceeds along one axis and equals along the others.

    What is not on this front could keep more units, and still be one of them.
    """
    lengths = [len(values) for values in space.choices.values()]
    strides = np.cumprod([1, *lengths[:0:-1]])[::-1].astype(np.int64)
    places = space.places[indices]
    codes = places @ strides
    dominated = np.zeros(len(indices), dtype=bool)
    for column, (length, stride) in enumerate(zip(lengths, strides, strict=True)):
        dominated |= (places[:, column] + 1 < length) & np.isin(codes + stride, codes)
    return indices[~dominated]
