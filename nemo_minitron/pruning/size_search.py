"""Which sizes a model of a given cost can have, and a schedule to find the best of them ([P1] Table 12)."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemo_minitron.families import VOCAB, Architecture, Family, check_sizes
from nemo_minitron.families.grammar import evaluate, names_in
from nemo_minitron.pruning.cost import (
    ROUND,
    Size,
    TensorCounts,
    cost,
    count_tensors,
    model_size,
    round_up,
)
from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.pruning.slice import Cut

MEASURES = ("parameters", "non_embedding", "active", "kv_bytes_per_token", "flops_per_token")
_MOST = 200_000
"""Combinations looked at, in seconds; more is a slip of the pen rather than a search, and fills memory."""
_GRID, _EACH = 10_000, 6
"""Most combinations of a default grid, and most sizes of one axis."""
_WIDE = 1_000_000
"""Most combinations of a default grid whose sizes are all looked at as arrays."""
_FLOOR = {"ffn": 0.7, "expert_ffn": 0.7, "shared_ffn": 0.7, "experts": 0.7}
"""Where a default grid begins, as a part of the common ratio; other widths begin at the ratio itself."""
_STAY = ("mamba_head_dim", "mamba_state")
"""Prunable axes that a default grid leaves alone: like head_dim they are what a single head is made of."""


@dataclass(frozen=True)
class Candidate:
    """Sizes that a smaller model could have.

    Attributes:
        sizes: the axes that were asked for or that change, in the family's order.
        size: what the model costs.
    """

    sizes: Mapping[str, int]
    size: Size


def candidates(
    model: Architecture,
    choices: Mapping[str, Sequence[float]],
    least: int,
    most: int,
    measure: str = "parameters",
    keep_layers: Callable[[int], Sequence[int]] = range,
    where: str = "search",
) -> list[Candidate]:
    """The combinations of sizes that the family allows and whose cost lies in a window ([P1] Table 12).

    Args:
        model: the model that is cut.
        choices: axis name to the sizes to try, ``expansion`` to ratios ffn / hidden; other axes
            keep their size, heads their number in each of the kv_heads.
        least: smallest cost allowed, in the unit of the measure.
        most: largest cost allowed.
        measure: the attribute of ``Size`` that is the cost, one of ``MEASURES``.
        keep_layers: which 0-based layers stay of a model cut to so many; by default the first.
        where: what error messages put before the axis' name.

    Returns:
        At least one; those nearest to the middle of the window first, on a tie the smaller sizes.

    Raises:
        ValueError: what is asked for cannot be; no combination in the window, with the nearest on
            both sides.
    """
    if measure not in MEASURES or least > most:
        raise ValueError(
            f"{where}: expected least <= most of {MEASURES}, found {least} to {most} {measure}"
        )
    before, grid = model.sizes, checked_choices(model, choices, where)
    shown = {"ffn" if name == "expansion" else name for name in choices}
    found, refusal = [], None
    for entry in _combinations(model, grid, keep_layers, where):
        if isinstance(entry, ValueError):
            refusal = entry
            continue
        sizes, size = entry
        changed = {n: value for n, value in sizes.items() if n in shown or value != before[n]}
        found.append((getattr(size, measure), tuple(sizes.values()), Candidate(changed, size)))
    if not found:
        raise ValueError(
            f"{where}: expected sizes that fit each other, found none; the last: {refusal}"
        )
    found.sort(key=lambda entry: (abs(2 * entry[0] - least - most), entry[1]))
    inside = [candidate for cost, _, candidate in found if least <= cost <= most]
    if inside:
        return inside
    sides = [*[e for e in found if e[0] < least][:1], *[e for e in found if e[0] > most][:1]]
    near = "; ".join(
        f"{c:,} ({', '.join(f'{n}={s}' for n, s in one.sizes.items())})" for c, _, one in sides
    )
    raise ValueError(
        f"{where}: expected {measure} of {least:,} to {most:,}, found none; nearest: {near}"
    )


def whole_choices(choices: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Choices as a configuration holds them, where every number is a float, with whole sizes as such."""
    return {
        name: [int(n) if name != "expansion" and float(n).is_integer() else n for n in values]
        for name, values in choices.items()
    }


def checked_choices(
    model: Architecture, choices: Mapping[str, Sequence[float]], where: str, most: int = _MOST
) -> dict[str, list[float]]:
    """The choices, each size once; the number of layers is always among them.

    Raises:
        ValueError: no axis of the model, or no size that it can have; more than ``most``
            combinations.
    """
    sizes, axes = model.sizes, model.settable
    if "expansion" in choices and "ffn" in choices:
        raise ValueError(f"{where}.expansion and {where}.ffn: expected one of them, found both")
    for name, values in choices.items():
        axis = "ffn" if name == "expansion" else name
        if axis not in axes:
            raise ValueError(
                f"{where}.{name}: expected a prunable axis of this model: {', '.join(axes)}"
            )
        if name == "expansion":
            wrong, kind = [v for v in values if not 0 < v < math.inf], "ratios ffn / hidden above 0"
        else:
            wrong = [v for v in values if type(v) is not int or not 1 <= v <= sizes[axis]]
            kind = f"whole numbers of 1 to {sizes[axis]} (the model's size)"
        if wrong or not values:
            raise ValueError(
                f"{where}.{name}: expected {kind}, found {wrong[0] if wrong else 'none'}"
            )
    grid = {name: sorted(set(values)) for name, values in choices.items()}
    if VOCAB in grid:
        grid[VOCAB] = sorted({round_up(VOCAB, int(n), sizes[VOCAB]) for n in grid[VOCAB]})
    count = math.prod(map(len, grid.values())) if grid else 0
    if not 1 <= count <= most:
        raise ValueError(f"{where}: expected 1 to {most:,} combinations of sizes, found {count:,}")
    return {"layers": [sizes["layers"]], **grid}


def _combinations(
    model: Architecture,
    grid: Mapping[str, list[float]],
    keep_layers: Callable[[int], Sequence[int]],
    where: str,
) -> Iterator[tuple[dict[str, int], Size] | ValueError]:
    """The sizes of all axes and the cost of every combination, or why it is not valid.

    Which tensors a model has takes long to find out; widths matter only where a row's condition
    names one.
    """
    family, before = model.family, model.sizes
    conditions = set().union(*(names_in(row.when) for row in family.rows if row.when))
    decisive = [n for n, axis in family.axes.items() if conditions & set(axis.config)]
    for layers in grid["layers"]:
        kept, known = keep_layers(int(layers)), dict[tuple[int, ...], TensorCounts]()
        assert len(kept) == layers, (
            "keep_layers keeps another number of layers than it was asked for"
        )
        try:
            model.check_layers(kept, where)
        except ValueError as error:
            yield error
            continue
        for values in itertools.product(
            *(grid[name] if name != "layers" else [layers] for name in grid)
        ):
            try:
                asked = _whole(dict(zip(grid, values, strict=True)), before["hidden"], where)
                sizes = complete_targets(family, before, asked, where)
                check_sizes(family, sizes, where)
            except ValueError as error:
                yield error
                continue
            key = tuple(sizes[axis] for axis in decisive)
            if key not in known:
                known[key] = count_tensors(Cut(model, {}, tuple(kept)).result.resized(sizes))
            yield sizes, cost(known[key], sizes)


def _whole(asked: dict[str, float], hidden: int, where: str) -> dict[str, int]:
    """Sizes of a combination, with ffn in the place of the expansion."""
    ffn = asked.pop("expansion", 0) * asked.get("hidden", hidden)
    if not math.isclose(ffn, round(ffn), rel_tol=1e-6):
        raise ValueError(f"{where}.expansion: expected a whole ffn, found {ffn:g}")
    return {name: int(value) for name, value in asked.items()} | (
        {"ffn": round(ffn)} if ffn else {}
    )


def default_choices(model: Architecture, share: float, wide: bool = False) -> dict[str, list[int]]:
    """A grid of sizes for a budget.

    Let r be the ratio to which all widths together had to shrink. hidden and heads begin at r,
    neurons and experts at 0.7 r, for one may be thinner where another is not; all go up to the
    model's own size, in steps of a power of two of which there are eight or more. Depths stay
    within a tenth of the model's; below a quarter of its parameters half and three quarters of its
    layers are tried too. That holds the space of [P1] Table 12: for 8 B hidden 4096 to 6144 by 512,
    ffn from 10240, heads from 32, 29 to 32 layers; its models lose width rather than depth. Query
    heads shrink inside their groups; groups go only where each has one head. Where no smaller
    hidden fits the model's heads, hidden is in proportion to them.

    Args:
        model: the model that is cut.
        share: parameters of the target / parameters of the model.
        wide: whether depths go down to r as widths do, for a search that looks at many.

    Returns:
        Axis name to ascending sizes, the model's own the last; at most 6, fewer where many axes
        would make more than 10,000 combinations (wide: 12, and 1,000,000). Axes without a choice are absent.

    Raises:
        ValueError: the share does not lie between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"share: expected a part of the model's parameters, 0 < share < 1, found {share}"
        )
    family, sizes, whole = model.family, model.sizes, model_size(model)
    # embeddings shrink with r, matrices with its square
    flat = 1 - whole.non_embedding / whole.parameters
    ratio = 2 * share / (flat + math.sqrt(flat**2 + 4 * (1 - flat) * share))
    axes = [n for n in model.prunable if n not in _STAY and not model.family.axes[n].follows]
    grid = {name: _steps(family, sizes, name, ratio * _FLOOR.get(name, 1)) for name in axes}
    hidden, heads = (
        grid.get("hidden", []),
        max(grid.get("heads", []), grid.get("kv_heads", []), key=len),
    )
    rules = [rule for rule in family.constraints if "hidden" in names_in(rule)]
    free = [n for n in hidden[:-1] if all(evaluate(rule, {**sizes, "hidden": n}) for rule in rules)]
    if hidden and heads and not free:
        grid["hidden"] = [sizes["hidden"] * n // heads[-1] for n in heads]
    layers = sizes["layers"]
    deep = {math.ceil(layers / 2), math.ceil(layers * 3 / 4)} if share < 0.25 else set()
    if "layers" in model.prunable:
        going = max(1, layers - math.floor(layers * ratio)) if wide else max(1, layers // 10)
        grid["layers"] = sorted({*range(max(1, layers - going), layers + 1), *deep})
    grid = {name: options for name, options in grid.items() if len(options) > 1}
    most, each = (_WIDE, 2 * _EACH) if wide else (_GRID, _EACH)
    last = max(2, min(each, int(most ** (1 / max(1, len(grid)))))) - 1
    return {
        name: sorted({options[round(i * (len(options) - 1) / last)] for i in range(last + 1)})
        for name, options in grid.items()
    }


def some_sizes(model: Architecture, name: str, floor: float = 0.25) -> list[int]:
    """Three sizes of an axis or fewer, ascending, from a part of the model's own up to that."""
    options = _steps(model.family, model.sizes, name, floor)
    if not options and model.sizes[name] > 1:  # whole groups
        options = [max(1, model.sizes[name] // 2), model.sizes[name]]
    return sorted(
        {*options[:1], *options[len(options) // 2 : len(options) // 2 + 1], *options[-1:]}
    )


def _steps(family: Family, sizes: Mapping[str, int], name: str, floor: float) -> list[int]:
    """Sizes of an axis from a floor (a share) up, whole groups; none where its units go with another axis."""
    unit = sizes.get(family.axes[name].within or "", 1)
    if any(axis.within == name and sizes[axis.name] > sizes[name] for axis in family.axes.values()):
        return []
    size, step = sizes[name] // unit, 1
    while size % (2 * step) == 0 and size >= 16 * step:
        step *= 2
    step = max(step, ROUND.get(name, 1)) if size >= 4 * ROUND.get(name, 1) else step
    options = {*range(max(1, int(floor * size / step)) * step, size, step), size}
    rules = [
        r for r in family.constraints if all(n == name or family.axes[n].fixed for n in names_in(r))
    ]
    return sorted(
        n * unit for n in options if all(evaluate(r, {**sizes, name: n * unit}) for r in rules)
    )


def rungs(candidates: int, steps: int, factor: int = 2) -> list[tuple[int, int]]:
    """Schedule of successive halving (Jamieson and Talwalkar, arXiv 1502.07943).

    Each rung keeps 1 / factor of the candidates and trains them factor times as long, so that all
    cost about the same. In total that is the sum of number x steps, at most rungs x factor x
    ``steps``; less still where candidates carry on from the rung before. Rankings move in the first
    300 steps or so ([P1]): let the first rung be no shorter.

    Args:
        candidates: how many there are to begin with.
        steps: training steps of the last rung.
        factor: each rung keeps 1 / factor of the candidates, rounded up.

    Returns:
        (candidates, steps of each, from their beginning) per rung; steps rise from rung to rung,
        and the last has at most ``factor`` candidates.

    Raises:
        ValueError: no candidate, a factor below 2, or too few steps to give the first rung one.
    """
    numbers = [candidates]
    while numbers[-1] > factor > 1:
        numbers.append(math.ceil(numbers[-1] / factor))
    least = factor ** (len(numbers) - 1)
    if candidates < 1 or factor < 2 or steps < least:
        what = f"at least 1 candidate, a factor of 2 and (here) {least} steps"
        raise ValueError(f"rungs: expected {what}, found {candidates}, {factor} and {steps}")
    return [(number, steps * factor**rung // least) for rung, number in enumerate(numbers)]


def halving(scores: Sequence[float], keep: int) -> list[int]:
    """Indices of the ``keep`` least scores, best first; on a tie the earlier one, NaN last.

    Raises:
        ValueError: ``keep`` is not between 1 and the number of scores.
    """
    if not 1 <= keep <= len(scores):
        raise ValueError(f"halving: expected to keep 1 to {len(scores)}, found {keep}")
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), scores[i]))[:keep]
