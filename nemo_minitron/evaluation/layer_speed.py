"""torch: times each kind of a model's layers at several sizes, on models of a few layers of that kind."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_minitron.evaluation.speed import conditions
from nemo_minitron.families import Architecture, check_sizes
from nemo_minitron.models.causal_lm import decoder_of, head_of
from nemo_minitron.models.skeleton import fill, skeleton
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.layer_times import Kind, LayerTimes
from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.pruning.size_search import some_sizes
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.workspace.manifest import digest

_MORE = 3
"""Layers by which two timed models differ; what a layer takes is the difference, divided."""
_REPEATS, _SECONDS = 5, 0.02
"""A pass is repeated so often, or for so long, whichever is more; the fastest counts."""
_MOST = 40
"""Combinations of sizes of one kind of layer; beyond it each axis has two sizes instead of three."""


@dataclass(frozen=True)
class Pass:
    """What is timed; the attributes are those of ``LayerTimes``."""

    dtype: torch.dtype
    phase: str
    batch: int
    context: int
    device: torch.device


def measure_layers(
    model: Architecture, what: Pass, advance: Callable[[int], None] = lambda count: None
) -> LayerTimes:
    """Times the layers of a model of random weights.

    Args:
        model: whose layers, in their full size and down to a quarter of each axis.
        what: the pass.
        advance: called with the number of combinations that are done.

    Raises:
        ValueError: transformers does not run this family in this phase.
    """
    firsts, kind_of = _kinds(model)
    kinds = [_kind(model, layer, what, advance) for layer in firsts]
    surroundings = conditions(str(what.device))
    return LayerTimes(
        str(surroundings["machine"]), str(surroundings["torch"]), model.family.model_type, dict(model.sizes),
        str(what.dtype).removeprefix("torch."), what.phase, what.batch, what.context,
        kinds, kind_of, _outside(model, firsts[0], kinds[0], what),
    )  # fmt: skip


def combinations(model: Architecture) -> int:
    """How many times ``measure_layers`` calls ``advance``."""
    return sum(len(list(_sizes(model, layer)[1])) for layer in _kinds(model)[0])


def _kinds(model: Architecture) -> tuple[list[int], list[int]]:
    """The first layer of each kind, and the kind of every layer; of one kind, models would be the same."""
    known: dict[str, int] = {}
    firsts, kind_of = [], []
    for layer in range(model.sizes["layers"]):
        one = Cut(model, {}, (layer,)).result
        described = digest([dict(one.config), sorted(one.present)])
        if described not in known:
            known[described] = len(firsts)
            firsts.append(layer)
        kind_of.append(known[described])
    return firsts, kind_of


def _sizes(model: Architecture, layer: int) -> tuple[list[str], Iterator[tuple[int, ...]]]:
    """The axes of a layer, and the combinations of their sizes."""
    axes, columns = _grid(model, layer)
    return axes, itertools.product(*columns)


def _grid(model: Architecture, layer: int) -> tuple[list[str], list[list[int]]]:
    one = Cut(model, {}, (layer,)).result
    every = {
        name: some_sizes(model, name)
        for name in one.prunable
        if name != "layers" and model.family.axes[name].follows is None
    }
    every = {name: sizes for name, sizes in every.items() if len(sizes) > 1}
    if math.prod(map(len, every.values())) > _MOST:
        every = {name: [sizes[0], sizes[-1]] for name, sizes in every.items()}
    return list(every), list(every.values())


def _kind(model: Architecture, layer: int, what: Pass, advance: Callable[[int], None]) -> Kind:
    axes, columns = _grid(model, layer)
    found: dict[tuple[int, ...], float] = {}
    weights: dict[tuple[int, ...], int] = {}
    for values in itertools.product(*columns):
        asked = dict(zip(axes, values, strict=True))
        sizes = _completed(model, asked)
        weights[values] = model_size(_models(model, layer, sizes, 1)).non_embedding
        try:
            check_sizes(model.family, sizes, "measure-layers")
        except ValueError:
            advance(1)
            continue  # no such model; from its neighbours below
        found[values] = _difference(model, layer, sizes, what)
        advance(1)
    for values in weights.keys() - found.keys():
        near = min(
            found, key=lambda other: sum(abs(a - b) / b for a, b in zip(values, other, strict=True))
        )
        found[values] = found[near] * weights[values] / weights[near]
    return Kind(axes, columns, [round(found[values], 6) for values in itertools.product(*columns)])


def _completed(model: Architecture, asked: Mapping[str, int]) -> dict[str, int]:
    try:
        return complete_targets(model.family, model.sizes, asked)
    except ValueError:  # no cut of this model; the layer may be one of another all the same
        return {**model.sizes, **asked}


def _outside(model: Architecture, layer: int, kind: Kind, what: Pass) -> Kind:
    """Embedding, final norm and head: what is left of a model when its layers are taken off.

    The layers are as small as they were measured, so that little is taken off.
    """
    smallest = {axis: each[0] for axis, each in zip(kind.axes, kind.sizes, strict=True)}
    hidden, times = smallest.pop("hidden", None), {}
    sizes_of = kind.sizes[kind.axes.index("hidden")] if hidden is not None else []
    for size in sizes_of or [model.sizes["hidden"]]:
        sizes = _completed(model, {**smallest, **({"hidden": size} if sizes_of else {})})
        try:
            check_sizes(model.family, sizes, "measure-layers")
        except ValueError:
            continue
        one = _timed(_models(model, layer, sizes, 1), what)
        many = _timed(_models(model, layer, sizes, 1 + _MORE), what)
        others = len(_companions(model, layer)) + 1
        times[size] = round(max(0.0, one - others * (many - one) / _MORE), 6)
    if len(times) > 1:
        return Kind(["hidden"], [list(times)], list(times.values()))
    return Kind([], [], list(times.values()) or [0.0])


def _difference(model: Architecture, layer: int, sizes: Mapping[str, int], what: Pass) -> float:
    one = _timed(_models(model, layer, sizes, 1), what)
    many = _timed(_models(model, layer, sizes, 1 + _MORE), what)
    return max(0.0, (many - one) / _MORE)


def _companions(model: Architecture, layer: int) -> list[int]:
    """Layers without which the architecture does not run a layer of another kind."""
    needed = [axis for axis in model.family.needs if axis in model.present]
    return [model.present[axis][0] for axis in needed if layer not in model.present[axis]]


def _models(model: Architecture, layer: int, sizes: Mapping[str, int], count: int) -> Architecture:
    """A model of so many layers like one, and what must be beside it."""
    layers = [*_companions(model, layer), *[layer] * count]
    if len(layers) == model.sizes["layers"]:  # which would be taken for the whole model
        longer = Cut(model, {}, (*range(model.sizes["layers"]), 0)).result
        return Cut(longer, {}, tuple(layers)).result.resized({**sizes, "layers": len(layers)})
    return Cut(model, {}, tuple(layers)).result.resized({**sizes, "layers": len(layers)})


def _timed(architecture: Architecture, what: Pass) -> float:
    """Milliseconds of the fastest of some passes."""
    empty = skeleton(architecture.config, what.dtype)
    torch.manual_seed(0)
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=what.device).normal_(0, 0.02)
        if tensor.is_floating_point() else torch.zeros_like(tensor, device=what.device)
        for name, tensor in empty.state_dict().items()
    }  # fmt: skip
    model = fill(empty, tensors, what.device)
    try:
        with torch.inference_mode():
            return _fastest(_passing(model, architecture, what), what.device)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"measure-layers: transformers does not run {architecture.family.model_type} in "
            f"plan.budget.phase={what.phase}: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _passing(model: Any, architecture: Architecture, what: Pass) -> Callable[[], Any]:
    """One pass, as a function."""
    decoder = decoder_of(model, architecture.family)
    head = head_of(model)
    tokens = torch.randint(0, head.shape[0], (what.batch, what.context), device=what.device)

    def prefill() -> Any:
        return decoder(input_ids=tokens, use_cache=False).last_hidden_state[:, -1] @ head.T

    if what.phase == "prefill":
        return prefill
    cache = decoder(input_ids=tokens, use_cache=True).past_key_values

    def decode() -> Any:
        found = decoder(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
        return found.last_hidden_state[:, -1] @ head.T

    return decode


def _fastest(act: Callable[[], Any], device: torch.device) -> float:
    act()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < _REPEATS or time.perf_counter() - begun < _SECONDS:
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)
