"""What a model costs, computed from its config.json and its family table alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.families import Family, axis_sizes, expected_tensors
from nemo_minitron.families.grammar import row_axes


@dataclass(frozen=True)
class Size:
    """Cost of one model.

    Attributes:
        parameters: every stored weight; embeddings and head count separately unless tied.
        non_embedding: without the tensors that have a vocabulary axis ([P1] Table 2).
        flops_per_token: forward FLOPs of one token at the mean position of a context of ``context`` tokens:
            two per weight of every matrix product, and 4 x heads x head_dim per attended position and layer.
        kv_bytes_per_token: bytes that one token adds to the KV cache, keys and values, all layers.
        context: tokens assumed by ``flops_per_token``.
        cache_bytes: bytes per cached number assumed by ``kv_bytes_per_token``.
    """

    parameters: int
    non_embedding: int
    flops_per_token: int
    kv_bytes_per_token: int
    context: int
    cache_bytes: int


def model_size(family: Family, config: Mapping[str, Any], context: int = 4096, cache_bytes: int = 2) -> Size:
    """Counts parameters, FLOPs and KV-cache bytes of a model.

    Args:
        family: the model's table.
        config: its config.json.
        context: tokens in the context that attention FLOPs assume; a causal token sees half of them on
            average.
        cache_bytes: bytes per number in the KV cache (2 for bfloat16).
    """
    sizes = axis_sizes(family, config)
    parameters = non_embedding = matrix = 0
    for _, row, shape in expected_tensors(family, config):
        count = math.prod(shape)
        parameters += count
        if "vocab" in row_axes(row.dims):
            continue
        non_embedding += count
        if len(shape) > 1:
            matrix += count
    head = sizes["vocab"] * sizes["hidden"]
    attention = 4 * sizes["heads"] * sizes["head_dim"] * sizes["layers"] * (context // 2)
    return Size(
        parameters=parameters,
        non_embedding=non_embedding,
        flops_per_token=2 * (matrix + head) + attention,
        kv_bytes_per_token=2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"] * cache_bytes,
        context=context,
        cache_bytes=cache_bytes,
    )
