"""Sizes that runtimes like, read off the family's table: for quantised blocks and for tensor parallelism.

``gguf``: llama.cpp's K-quants hold 256 weights of a row in a block; a matrix whose rows are no multiple of
that is stored in a larger type (``llama_tensor_get_type`` in src/llama-quant.cpp). ``fp8_block``: weights
with a scale for every 128 x 128 block (``weight_block_size`` of DeepSeek-V3's config.json); each rank's part
has to be whole blocks (vLLM, ``validate_fp8_block_shape``). ``tp:N``: N ranks of tensor parallelism, among
which heads and neurons are divided.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_minitron.families import Architecture, evaluate
from nemo_minitron.families.grammar import Product, names_in

RUNTIMES = ("gguf", "fp8_block", "tp:N")
_K_BLOCK, _FP8_BLOCK = 256, 128
_WHOLE = {"hidden", "vocab", "layers", "experts"}
"""Axes that tensor parallelism does not divide among ranks: experts go whole."""
_COPIED = {"kv_heads", "mamba_groups"}
"""Axes of which each rank gets a copy where there are fewer units than ranks."""


@dataclass(frozen=True)
class Rule:
    """What a runtime asks of the sizes.

    Attributes:
        runtime: who asks, as in ``plan.serve``.
        what: an expression over axes that shall be a multiple.
        multiple: of what.
        unless: an expression over axes under which it need not; empty: none.
    """

    runtime: str
    what: str
    multiple: int
    unless: str = ""

    @property
    def condition(self) -> str:
        """The rule as a condition over axes."""
        text = f"({self.what}) % {self.multiple} == 0"
        return f"{text} or {self.unless}" if self.unless else text

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether sizes obey it."""
        return bool(evaluate(self.condition, sizes))


def serving_rules(
    model: Architecture, serve: Sequence[str], where: str = "plan.serve"
) -> list[Rule]:
    """What runtimes ask of a model's sizes.

    Args:
        model: the model.
        serve: names of ``RUNTIMES``, as ``["gguf", "tp:4"]``.
        where: what an error message calls them.

    Raises:
        ValueError: an unknown runtime.
    """
    ranks, wanted = 1, set()
    for name in serve:
        match = re.fullmatch(r"tp:([1-9][0-9]{0,3})", name)
        if match is None and name not in RUNTIMES[:2]:
            raise ValueError(f"{where}: expected {', '.join(RUNTIMES)}, found {name!r}")
        ranks = int(match[1]) if match else ranks
        wanted.add(name if match is None else "tp")
    rules = {
        "gguf": _gguf(model),
        "fp8_block": _fp8(model, ranks),
        "tp": _tensor_parallel(model, ranks),
    }
    found = [rule for name, of in rules.items() if name in wanted for rule in of]
    return list(dict.fromkeys(found))


def _matrices(model: Architecture) -> Iterator[tuple[tuple[Product, ...], ...]]:
    """The last two dimensions of every matrix that the model has, routers apart."""
    for row in model.family.rows:
        if len(row.dims) < 2 or row.dims[-2] == (("experts",),) or not model.has(row):
            continue
        yield row.dims[-2:]


def _changes(model: Architecture, product: Product) -> bool:
    return any(axis in model.resizable for axis in product)


def _gguf(model: Architecture) -> Iterator[Rule]:
    for _, inputs in _matrices(model):
        if any(_changes(model, product) for product in inputs):
            yield Rule("gguf", " + ".join(map(" * ".join, inputs)), _K_BLOCK)


def _fp8(model: Architecture, ranks: int) -> Iterator[Rule]:
    for product in itertools.chain.from_iterable(itertools.chain(*_matrices(model))):
        if not _changes(model, product):
            continue
        divided = not set(product) & (_WHOLE | _COPIED)
        yield Rule("fp8_block", " * ".join(product), _FP8_BLOCK * (ranks if divided else 1))


def _tensor_parallel(model: Architecture, ranks: int) -> Iterator[Rule]:
    for product in itertools.chain.from_iterable(itertools.chain(*_matrices(model))):
        axis = product[0]
        if axis.isdecimal() or axis in _WHOLE or axis not in model.prunable:
            continue
        unless = f"{ranks} % {axis} == 0" if axis in _COPIED else ""
        yield Rule(f"tp:{ranks}", axis, ranks, unless)


def broken(model: Architecture, sizes: Mapping[str, int], rules: Sequence[Rule]) -> list[Rule]:
    """Rules that new sizes break; what a cut leaves as it is, is not its business."""
    return [
        rule
        for rule in rules
        if not rule.holds(sizes)
        and any(sizes[name] != model.sizes[name] for name in names_in(rule.what))
    ]


def check_serving(
    model: Architecture, sizes: Mapping[str, int], serve: Sequence[str], where: str
) -> None:
    """Refuses sizes that the runtimes of ``plan.serve`` do not run as they should.

    Raises:
        ValueError: one is no multiple of what its runtime asks for; the message names the nearest.
    """
    for rule in broken(model, sizes, serving_rules(model, serve, where)):
        raise ValueError(f"{where}: {_said(model, sizes, rule)}")


def _said(model: Architecture, sizes: Mapping[str, int], rule: Rule) -> str:
    names = sorted(names_in(rule.what))
    found = ", ".join(f"{name}={sizes[name]}" for name in names)
    near = "; ".join(filter(None, (_nearest(model, sizes, rule, name) for name in names)))
    return (
        f"{rule.runtime} wants {rule.what} to be a multiple of {rule.multiple}, found {found}"
        f"{f' (nearest: {near})' if near else ''}"
    )


def _nearest(model: Architecture, sizes: Mapping[str, int], rule: Rule, name: str) -> str:
    if name not in model.resizable or sizes[name] == model.sizes[name]:
        return ""
    most, size = model.sizes[name], sizes[name]
    below = next((n for n in range(size, 0, -1) if rule.holds({**sizes, name: n})), None)
    above = next((n for n in range(size, most + 1) if rule.holds({**sizes, name: n})), None)
    good = [f"{name}={n}" for n in (below, above) if n is not None]
    return " or ".join(good)


def served(model: Architecture, serve: Sequence[str]) -> Architecture:
    """The model, with what runtimes ask for among the rules of its family: a search keeps to them."""
    added = []
    for rule in serving_rules(model, serve):
        names = sorted(names_in(rule.what) & set(model.family.axes))
        same = " and ".join(f"{name} == {model.sizes[name]}" for name in names)
        added.append(f"{rule.condition} or ({same})")
    family = replace(model.family, constraints=(*model.family.constraints, *added))
    return replace(model, family=family)


COSTS = {
    "gguf": "llama.cpp's K-quants store those matrices in a larger type",
    "fp8_block": "FP8 with 128 x 128 blocks pads those matrices, or refuses them",
}


def serving_notes(model: Architecture, sizes: Mapping[str, int], serve: Sequence[str]) -> list[str]:
    """What new sizes cost in runtimes that ``plan.serve`` leaves out; a line per rule the source kept."""
    others = [name for name in COSTS if name not in serve]
    lines = []
    for rule in broken(model, sizes, serving_rules(model, others)):
        if rule.holds(model.sizes):
            lines.append(f"{_said(model, sizes, rule)}: {COSTS[rule.runtime]}")
    return lines
