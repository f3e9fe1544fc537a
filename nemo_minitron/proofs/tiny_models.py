"""Tiny models made from a family table, and the changes that its proofs make to them."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import SINGLE, Checkpoint
from nemo_minitron.families import Architecture, Family, find_row
from nemo_minitron.families.grammar import Dim, row_axes, segments
from nemo_minitron.pruning.positions import dim_index
from nemo_minitron.pruning.select import Keep, complete_targets, score_shape

SIZES = {
    "hidden": 32, "ffn": 40, "heads": 8, "kv_heads": 2, "head_dim": 4, "vocab": 96, "layers": 4, "experts": 4,
    "expert_ffn": 16, "shared_ffn": 28, "experts_per_token": 2, "expert_groups": 1, "groups_per_token": 1,
    "shared_experts": 1, "layer_vocab": 96, "mamba_heads": 8,
    "mamba_groups": 2, "mamba_head_dim": 6, "mamba_state": 10, "conv_kernel": 4, "linear_key_heads": 4,
    "linear_value_heads": 8, "linear_key_dim": 6, "linear_value_dim": 10,
}  # fmt: skip
"""Sizes of the tiny models. Grouped axes have several units per group, no two axes can be confused."""
_TOKENS = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "max_position_embeddings": 64,
}
_CHUNKS = {"chunk_size": 8, "mamba_chunk_size": 8}
"""Positions that a state space layer computes at once: of the usual 256, most would be padding."""


def tiny_config(family: Family, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of this family, small enough for a test.

    Args:
        family: the table.
        changes: config values that replace those made from the table.
    """
    sizes = {
        axis.config[0]: SIZES.get(name, 4) for name, axis in family.axes.items() if axis.config
    }
    return {"model_type": family.model_type, **sizes, **_CHUNKS, **_TOKENS, **changes}


def tiny_model(family: Family, changes: Mapping[str, Any], folder: Path, seed: int = 0) -> Path:
    """Saves a random model with norms, biases and router buffers at unit scale.

    Raises:
        ModuleNotFoundError: the installed transformers does not have this architecture.
    """
    try:
        return random_model(tiny_config(family, changes), folder, seed)
    except ValueError as error:
        text = f"transformers {transformers.__version__} has no {family.model_type} (since {family.since})"
        raise ModuleNotFoundError(text) from error


def random_model(config: Mapping[str, Any], folder: Path, seed: int = 0) -> Path:
    """Saves a model whose every weight is random: vectors at unit scale, matrices at 0.3.

    Args:
        config: a config.json.
        folder: where it goes.
        seed: seed of the weights.

    Raises:
        ValueError: the installed transformers does not know the ``model_type``.
    """
    entries = {key: value for key, value in config.items() if key != "model_type"}
    settings = transformers.AutoConfig.for_model(config["model_type"], **entries)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    random_weights(model)
    model.save_pretrained(folder)
    return folder


def random_weights(model: Any) -> None:
    """Makes every weight random: vectors at unit scale, matrices at 0.3."""
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
            scale = 1.0 if tensor.dim() == 1 else 0.3
            tensor.copy_(torch.randn(tensor.shape) * scale)


def in_memory_names(checkpoint: Checkpoint, folder: Path) -> Path:
    """A copy of a tiny model that stores, where its table knows both, what transformers holds in memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, trust_remote_code=False
    )
    tensors = load_file(checkpoint.folder / SINGLE)
    for mine, others in checkpoint.family.stacked:
        gone = [name for name in tensors if any(row.regex.fullmatch(name) for row in mine)]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in set(gone)}
        for name, tensor in model.state_dict().items():
            if any(row.regex.fullmatch(name) for row in others):
                tensors[name] = tensor.clone()
    shutil.copytree(checkpoint.folder, folder)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def permutation(model: Architecture, axes: Sequence[str], seed: int = 1) -> Keep:
    """Kept units that keep all of them, in another order.

    Units move inside their group, groups move whole.
    """
    family, sizes = model.family, model.sizes
    generator = torch.Generator().manual_seed(seed)
    keep: Keep = {}
    for name in sorted(family.prunable, key=lambda name: family.axes[name].within is not None):
        group = family.axes[name].within
        if name not in axes and group not in axes:
            continue
        shape = score_shape(family, sizes, name)
        orders = []
        for owner in range(math.prod(shape[:-1])):
            if group is None:
                orders.append(_shuffled(sizes[name], generator))
                continue
            inside = sizes[name] // sizes[group]
            moved = (
                keep[group].reshape(-1, sizes[group])[owner]
                if group in keep
                else torch.arange(sizes[group])
            )
            still = torch.arange(inside)
            orders.append(torch.cat([
                g * inside + (_shuffled(inside, generator) if name in axes else still)
                for g in moved
            ]))  # fmt: skip
        keep[name] = torch.stack(orders).reshape(shape)
    return keep


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    """A random order, never the present one; a plain shuffle would keep two units half of the time."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def dying(model: Architecture, axes: Sequence[str]) -> dict[str, Tensor]:
    """Half the units of some axes, the units inside of them, and of what follows their sizes, by axis.

    Raises:
        ValueError: an axis follows others' sizes itself.
    """
    units: dict[str, Tensor] = {}
    for axis in axes:
        for name, which in _half_of(model.family, model.sizes, axis).items():
            units[name] = torch.cat([units.get(name, which), which]).unique()
    return units


def living(model: Architecture, dead: Mapping[str, Tensor]) -> tuple[Keep, list[int]]:
    """The units and the layers that are left."""
    keep: Keep = {}
    for name, which in dead.items():
        alive = torch.tensor([u for u in range(model.sizes[name]) if u not in which.tolist()])
        shape = score_shape(model.family, model.sizes, name)
        keep[name] = alive.expand(*shape[:-1], -1).contiguous()
    layers = keep.pop("layers", torch.arange(model.sizes["layers"]))
    return keep, layers.tolist()


def dead_copy(checkpoint: Checkpoint, dead: Mapping[str, Tensor], deaf: bool, folder: Path) -> Path:
    """Saves a copy in which units are dead: weights of zero, experts that get no token.

    Args:
        checkpoint: a tiny model in one file.
        dead: the units, by axis.
        deaf: whether experts die of getting no token; their routers' weights are not zero then.
        folder: where the copy goes.
    """
    family, sizes = checkpoint.family, checkpoint.architecture.sizes
    tensors = load_file(checkpoint.folder / SINGLE)
    if deaf:
        _deafen(family, tensors, dead["experts"])
    for name, tensor in tensors.items():
        row, units = find_row(family, name) or (None, {})
        assert row is not None, name
        for dying, which in dead.items():
            placeholder = family.axes[dying].index
            if placeholder in units:
                if units[placeholder] in which.tolist():
                    tensor.zero_()
            elif not (deaf and dying == "experts"):
                for position, dim in enumerate(row.dims):
                    tensor.index_fill_(position, _positions(dim, sizes, dying, which), 0)
    shutil.copytree(checkpoint.folder, folder)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def _half_of(family: Family, sizes: Mapping[str, int], axis: str) -> dict[str, Tensor]:
    """Half the units of an axis, and all that goes with them.

    Raises:
        ValueError: the axis follows others' sizes itself.
    """
    living = sizes[axis] // 2
    units = {axis: torch.arange(living, sizes[axis])}
    group = family.axes[axis].within
    if group is not None:  # the same number in every group
        inside = sizes[axis] // sizes[group]
        living = inside // 2 * sizes[group]
        units[axis] = torch.cat(
            [torch.arange(g * inside + inside // 2, (g + 1) * inside) for g in range(sizes[group])]
        )
    for inner in family.axes.values():
        if inner.within == axis:
            many = sizes[inner.name] // sizes[axis]
            units[inner.name] = torch.arange(living * many, sizes[inner.name])
    after = complete_targets(family, sizes, {axis: sizes[axis] - len(units[axis])}, axis)
    for name in family.prunable:
        if family.axes[name].follows and after[name] < sizes[name]:
            units[name] = torch.arange(after[name], sizes[name])
    return units


def _positions(dim: Dim, sizes: Mapping[str, int], axis: str, units: Tensor) -> Tensor:
    """Positions along a dimension that belong to the given units of an axis."""
    parts = [torch.zeros(0, dtype=torch.int64)]
    for product, start, _ in segments(dim, sizes):
        if axis in product:
            index = dim_index((product,), sizes, {axis: units})
            assert index is not None
            parts.append(index + start)
    return torch.cat(parts)


def _deafen(family: Family, tensors: dict[str, Tensor], experts: Tensor) -> None:
    """Changes routers so that they never choose some experts.

    Hidden channel 0 is made a large constant that no block writes and every norm lets through; the
    routers' weights for these experts are strongly negative there, and zero elsewhere.
    """
    for name, tensor in tensors.items():
        row, _ = find_row(family, name) or (None, {})
        assert row is not None, name
        factor = "norm" in name or name.endswith(("scale", "scalar"))
        if row.dims == ((("1",),),):  # what multiplies a whole layer's output
            tensor.fill_(1.0)
        for position, dim in enumerate(row.dims):
            if dim == (("hidden",),):
                channel: Callable[..., Tensor] = tensor.select(position, 0).fill_
                channel(30.0 if "embed" in name else 1.0 if factor else 0.0)
        axes = row_axes(row.dims)
        if "experts" in axes and axes <= {"experts", "hidden"} and tensor.dim() <= 2:
            place = next(i for i, dim in enumerate(row.dims) if dim == (("experts",),))
            tensor.index_fill_(place, experts, 0.0 if "hidden" in axes else -100.0)
            if "hidden" in axes:
                tensor[experts] = tensor[experts].index_fill_(-1, torch.tensor([0]), -1000.0)
