"""Config.json files as published, from tests/families/real_configs, and shrunk to sizes for a test."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.families import Architecture, architecture_of
from nemo_minitron.pruning.select import followed

FOLDER = Path(__file__).parents[1] / "families" / "real_configs"
TINY = {"vocab": 96, "layer_vocab": 96, "ffn": 40, "expert_ffn": 16, "shared_ffn": 24, "mamba_heads": 8, "mamba_head_dim": 4,
        "mamba_state": 6, "latent": 12, "query_latent": 20, "rotary_dim": 4, "plain_dim": 6, "value_dim": 10,
        "linear_key_heads": 2, "linear_key_dim": 4, "linear_value_dim": 6, "head_dim": 8}  # fmt: skip
CLOSE = {"sliding_window": 6, "attention_chunk_size": 6, "block_multiple_of": 8}
"""Lengths that a dozen tokens reach."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval")
FACTORS = ("short_factor", "long_factor")


def published() -> dict[str, dict[str, Any]]:
    """The configs by the name of their model on the hub."""
    files = [yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))]
    return dict(itertools.chain.from_iterable(file.items() for file in files))


def shrunk(config: Mapping[str, Any], layers: int = 4) -> dict[str, Any]:
    """A config with small sizes; every other key is as published.

    Ratios that decide what can be cut stay of their kind: heads in a group, one group or several,
    whether the heads fill the hidden channels, experts in groups; of layers at least one of each kind.
    """
    model = architecture_of(config)
    sizes = {**model.sizes, **_sizes(model)}
    sizes = followed(model.family, sizes)
    small = dict(config)
    for name, axis in model.family.axes.items():
        # a key that transformers does not read cannot be shrunk
        keys = [key for key in axis.config if config.get(key) and key != "attention_head_dim"]
        small.update({key: sizes[name] for key in keys})
    _shrink_layers(model, small, layers)
    for key, value in CLOSE.items():
        if small.get(key):
            small[key] = value
    if "rotary_dim" in small:
        small["rotary_dim"] = sizes["head_dim"] * config["rotary_dim"] // model.sizes["head_dim"]
    for key in TOKENS:
        _shrink_tokens(small, key)
    for key in ("rope_scaling", "rope_parameters"):
        _shrink_factors(small, key, sizes["head_dim"] // 2 if "head_dim" in sizes else 0)
    return small


def _sizes(model: Architecture) -> dict[str, int]:
    """The small sizes of the axes that have none that follows from others."""
    was = model.sizes
    sizes = {axis: TINY[axis] for axis in TINY if axis in was}
    if "kv_heads" in was:
        alone = was["heads"] == was["kv_heads"]
        sizes["kv_heads"] = 4 if alone else min(was["kv_heads"], 2)
        sizes["heads"] = 4 if alone else sizes["kv_heads"] * min(was["heads"] // was["kv_heads"], 4)
    else:
        sizes["heads"] = 4
    full = was["hidden"] == was["heads"] * was.get("head_dim", 0)
    sizes["hidden"] = sizes["heads"] * 8 if full else 48
    if "experts" in was:
        sizes["expert_groups"] = min(was.get("expert_groups", 1), 2)
        sizes["experts"] = 4 * sizes["expert_groups"]
        sizes["experts_per_token"] = min(was["experts_per_token"], 2)
        sizes["groups_per_token"] = 1
        sizes["shared_experts"] = was.get("shared_experts", 1)
    if "mamba_groups" in was:
        sizes["mamba_groups"] = min(was["mamba_groups"], 2)
    if "mamba_expand" in was:
        sizes["mamba_head_dim"] = was["mamba_expand"] * sizes["hidden"] // sizes["mamba_heads"]
    if "linear_value_heads" in was:
        per_key = was["linear_value_heads"] // was["linear_key_heads"]
        sizes["linear_value_heads"] = 2 * per_key
    return {axis: size for axis, size in sizes.items() if axis in was}


def _shrink_layers(model: Architecture, small: dict[str, Any], layers: int) -> None:
    """Keeps the first layer of each kind, and the first others."""
    axis = model.family.axes["layers"]
    lists = {key: small[key] for key in axis.lists if small.get(key)}
    kinds = list(zip(*lists.values(), strict=False))
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    kept = sorted(
        [*first, *(i for i in range(layers) if i not in first)][: max(layers, len(first))]
    )
    if small.get("num_kv_shared_layers"):  # two, behind a layer of each kind that has its own
        kept = [*sorted(first), len(kinds) - 2, len(kinds) - 1]
        small["num_kv_shared_layers"] = 2
    count = len(kept)
    for key, value in small.items():  # a pattern that transformers counts out
        if not lists and key in PATTERNS and type(value) is int:
            kept = list(range(max(count, value)))
            count = len(kept)
    for key in axis.counts:
        small[key] = min(small[key], 1)
    for key in axis.indices:
        if small.get(key):
            small[key] = [unit for unit in small[key] if unit < count]
    for key, entries in lists.items():
        chosen = [entries[i] for i in kept]
        small[key] = "".join(chosen) if isinstance(entries, str) else chosen
    if small.get("moe_layer_end_index", -1) > 0:
        small["moe_layer_end_index"] = count - 1
    small["num_hidden_layers"] = count


def _shrink_tokens(small: dict[str, Any], key: str) -> None:
    value = small.get(key)
    if isinstance(value, list):
        small[key] = [i + 1 for i in range(len(value))]
    elif value is not None:
        small[key] = TOKENS.index(key)


def _shrink_factors(small: dict[str, Any], key: str, length: int) -> None:
    """Longrope has a factor for each pair of channels that is rotated."""
    rope = small.get(key)
    if isinstance(rope, dict):
        cut = {name: rope[name][:length] for name in FACTORS if name in rope}
        small[key] = {**rope, **cut}
