"""What a model costs, computed from its config.json and its family table alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.families import Family, axis_sizes, expected_tensors, present_axes
from nemo_minitron.families.grammar import row_axes


@dataclass(frozen=True)
class Size:
    """Cost of one model.

    Attributes:
        parameters: every stored weight; embeddings and head count separately unless tied.
        non_embedding: without the tensors that have a vocabulary axis ([P1] Table 2).
        active: parameters that one token meets: of the routed experts only those it is sent to.
        flops_per_token: forward FLOPs of one token at the mean position of a context of ``context``
            tokens: two per active weight of every matrix product, and 4 x heads x head_dim per
            attended position and attention layer. Convolutions and recurrences of Mamba layers
            (about 3 % of theirs) are left out.
        kv_bytes_per_token: bytes that one token adds to the KV cache, keys and values, all
            attention layers.
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


def model_size(
    family: Family, config: Mapping[str, Any], context: int = 4096, cache_bytes: int = 2
) -> Size:
    """Counts parameters, FLOPs and KV-cache bytes of a model.

    Args:
        family: the model's table.
        config: its config.json.
        context: tokens in the context that attention FLOPs assume; a causal token sees half of them
            on average.
        cache_bytes: bytes per number in the KV cache (2 for bfloat16).
    """
    sizes = axis_sizes(family, config)
    parameters = non_embedding = active = matrix = 0
    for _, row, shape in expected_tensors(family, config):
        count = math.prod(shape)
        axes = row_axes(row.dims)
        met = count
        if "expert_ffn" in axes:  # a routed expert: a token is sent to some of them
            met = count * sizes["experts_per_token"] // sizes["experts"]
        parameters += count
        active += met
        if "vocab" in axes:
            continue
        non_embedding += count
        if len(shape) > 1:
            matrix += met
    head = sizes["vocab"] * sizes["hidden"]
    layers = len(present_axes(family, config).get("heads", []))
    attention = 4 * sizes["heads"] * sizes["head_dim"] * layers * (context // 2)
    return Size(
        parameters=parameters,
        non_embedding=non_embedding,
        active=active,
        flops_per_token=2 * (matrix + head) + attention,
        kv_bytes_per_token=2 * layers * sizes["kv_heads"] * sizes["head_dim"] * cache_bytes,
        context=context,
        cache_bytes=cache_bytes,
    )


ROUND = {"hidden": 64, "ffn": 64, "expert_ffn": 64, "shared_ffn": 64, "head_dim": 8}
"""Multiples that matrix kernels, tensor parallelism (ffn) and attention kernels (head_dim) run fast with."""


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
