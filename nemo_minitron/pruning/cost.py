"""What a model costs, computed from its config.json and its family table alone."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.families import Architecture
from nemo_minitron.families.grammar import Product, Row, row_axes, row_shape


@dataclass(frozen=True)
class Size:
    """Cost of one model.

    Attributes:
        parameters: every stored weight; embeddings and head count separately unless tied.
        non_embedding: without the tensors that have a vocabulary axis ([P1] Table 2), tables of
            embeddings per layer among them.
        active: parameters that one token meets: of the routed experts only those it is sent to.
        flops_per_token: forward FLOPs of one token at the mean position of a context of ``context``
            tokens: two per active weight of every matrix product, and 4 x heads x their length per
            attended position and attention layer (latent attention: 2 x heads x lengths of a query
            and a value head; windows of sliding attention are not looked at). Convolutions and
            recurrences of Mamba layers (about 3 % of theirs) are left out.
        kv_bytes_per_token: bytes that one token adds to the KV cache, keys and values, all
            attention layers but those that read another layer's.
        context: tokens assumed by ``flops_per_token``.
        cache_bytes: bytes per cached number assumed by ``kv_bytes_per_token``.
    """

    parameters: int
    non_embedding: int
    active: int
    flops_per_token: int
    kv_bytes_per_token: int
    context: int
    cache_bytes: int


_QUERIES, _KEYS = frozenset({"heads"}), frozenset({"kv_heads", "global_kv_heads"})
_VOCABULARIES = {"vocab", "layer_vocab"}


@dataclass(frozen=True)
class TensorCounts:
    """Which tensors a model has, whatever its widths.

    Attributes:
        tensors: how many there are of each shape, for one unit of the axes beside it (each expert
            has its own).
        attention: how many layers have query heads, by the axes that make up a layer's heads.
        cached: the same of key heads, of the layers that make keys and values of their own.
    """

    tensors: Mapping[tuple[Row, tuple[str, ...]], int]
    attention: Counter[Product]
    cached: Counter[Product]


def count_tensors(model: Architecture) -> TensorCounts:
    """Counts a model's tensors."""
    family = model.family
    beside = {index: axis.name for index, axis in family.indexed.items() if axis.name != "layers"}
    count = Counter[tuple[Row, tuple[str, ...]]]()
    for row in family.rows:
        units = tuple(beside[index] for index in row.placeholders if index in beside)
        count[row.dims, units] += sum(1 for _ in model.names(row, model.one_of_each))
    heads = {kind: _by_layer(model, names) for kind, names in (("q", _QUERIES), ("kv", _KEYS))}
    return TensorCounts(count, heads["q"], heads["kv"])


def _by_layer(model: Architecture, names: frozenset[str]) -> Counter[Product]:
    """How many layers have heads of a kind, by the heads' axis and that of their length."""
    found = {}
    for row in model.family.rows:
        heads = [p for dim in row.dims for p in dim if names & set(p)]
        if len(row.dims) == 2 and heads:
            for _, units in model.names(row, model.one_of_each):
                found[units[model.family.layer]] = (heads[0][0], heads[0][-1])
    return Counter(found.values())


def cost(
    counts: TensorCounts, sizes: Mapping[str, int], context: int = 4096, cache_bytes: int = 2
) -> Size:
    """Parameters, FLOPs and KV-cache bytes of a model with these tensors and sizes.

    Args:
        counts: what ``count_tensors`` gave.
        sizes: size of every axis.
        context: tokens in the context that attention FLOPs assume; a causal token sees half of them
            on average.
        cache_bytes: bytes per number in the KV cache (2 for bfloat16).
    """
    return Size(
        **sums(counts, sizes, context, cache_bytes), context=context, cache_bytes=cache_bytes
    )


def sums(
    counts: TensorCounts, sizes: Mapping[str, Any], context: int = 4096, cache_bytes: float = 2
) -> dict[str, Any]:
    """The numbers of ``Size``; of many models at once where sizes are arrays that broadcast together."""
    parameters: Any = 0
    non_embedding: Any = 0
    active: Any = 0
    matrix: Any = 0
    for (dims, units), count in counts.tensors.items():
        shape, axes = row_shape(dims, sizes), row_axes(dims)
        number, each = count * math.prod(sizes[axis] for axis in units), math.prod(shape)
        routed = "expert_ffn" in axes  # a token is sent to some of the experts
        met = each * sizes["experts_per_token"] // sizes["experts"] if routed else each
        parameters = parameters + number * each
        active = active + number * met
        if not axes & _VOCABULARIES:
            non_embedding = non_embedding + number * each
            matrix = matrix + (number * met if len(shape) > 1 else 0)
    width, cached = _attention(counts, sizes)
    head = sizes["vocab"] * sizes["hidden"]
    return {
        "parameters": parameters,
        "non_embedding": non_embedding,
        "active": active,
        "flops_per_token": 2 * (matrix + head) + 2 * width * (context // 2),
        "kv_bytes_per_token": cached * cache_bytes,
    }


def _attention(counts: TensorCounts, sizes: Mapping[str, Any]) -> tuple[Any, Any]:
    """Of all layers: numbers multiplied and summed for a pair of positions, and cached for a token.

    Latent attention caches what keys and values of all heads are made of, and the part of the keys
    that is rotated.
    """
    if "latent" in sizes:
        layers = counts.attention.total()
        return (
            layers * sizes["heads"] * (sizes["query_dim"] + sizes["value_dim"]),
            layers * (sizes["latent"] + sizes["rotary_dim"]),
        )
    made, kept = (
        sum(number * 2 * sizes[heads] * sizes[length] for (heads, length), number in kind.items())
        for kind in (counts.attention, counts.cached)
    )
    return made, kept


def model_size(model: Architecture, context: int = 4096, cache_bytes: int = 2) -> Size:
    """Counts parameters, FLOPs and KV-cache bytes of a model; the arguments are those of ``cost``."""
    return cost(count_tensors(model), model.sizes, context, cache_bytes)


ROUND = {
    "hidden": 64, "ffn": 64, "expert_ffn": 64, "shared_ffn": 64, "head_dim": 8, "vocab": 128,
}  # fmt: skip
"""Multiples that matrix kernels, tensor parallelism (ffn), FP8 blocks (vocab) and attention kernels
(head_dim) run fast with."""


def round_up(axis: str, size: int, most: int) -> int:
    """The next size that kernels like, at most the model's own; the size itself of a tiny model."""
    multiple = ROUND[axis]
    return min(most, -(-size // multiple) * multiple) if most >= 4 * multiple else size


def alignment(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Advice on sizes that are slow in kernels: a line per axis, with the nearest good sizes.

    Sizes that the cut does not touch, or of models too small to matter, are passed over.
    """
    lines = []
    for axis, multiple in ROUND.items():
        size = after.get(axis, 0)
        if (
            size % multiple
            and before[axis] >= 4 * multiple
            and (size != before[axis] or axis == "head_dim")
        ):
            down = size // multiple * multiple
            good = [str(n) for n in (down, down + multiple) if 0 < n <= before[axis]]
            what = (
                f"nearest: {', '.join(good)}" if axis != "head_dim" else "expect slower attention"
            )
            lines.append(
                f"{axis}={size} is no multiple of {multiple}, which fast kernels want; {what}"
            )
    return lines
