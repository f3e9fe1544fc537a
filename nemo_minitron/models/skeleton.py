"""torch, transformers: models without weights, and how one in memory holds the tensors of its checkpoint."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.set_aside import OUTPUTS
from nemo_minitron.families import Family, find_row
from nemo_minitron.families.grammar import Dim
from nemo_minitron.models.causal_lm import layer_list
from nemo_minitron.models.config_trial import config_object

Part = tuple[Dim, Tensor]
"""A dimension of a stored tensor, and where along a dimension in memory its positions lie."""


@dataclass(frozen=True)
class Layout:
    """How one tensor in memory is made of stored ones.

    Attributes:
        name: of the first stored tensor in it.
        dims: per dimension in memory the parts that lie along it; none where it is one position long.
    """

    name: str
    dims: tuple[tuple[Part, ...], ...]


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Modules made during the block have parameters without memory; their buffers are real.

    ``torch.device("meta")`` would take the buffers' values, too, which follow from the configuration.
    """
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A causal LM without weights, for reading: its parameters lie on the meta device.

    Args:
        config: a config.json.
        dtype: of the weights that it will get.
    """
    plainly = {key: key == "return_dict" for key in OUTPUTS if key in config}
    settings = config_object({**both_spellings(config), **plainly})
    with _weightless():
        model = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=dtype, trust_remote_code=False
        )
    return model.eval()


def fill(model: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Gives a skeleton its weights as they are, without a copy, and moves the rest to their device.

    Args:
        model: of ``skeleton``.
        tensors: names of its state to tensors.
        device: where they lie.
    """
    for name in list(model.state_dict(keep_vars=True)):
        path, _, own = name.rpartition(".")
        module, tensor = model.get_submodule(path), tensors[name]
        if own in module._parameters:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[own] = tensor
    return model.to(device)


def layouts(model: Any, family: Family) -> dict[str, Layout]:
    """How each tensor of a model's state is made of those of its checkpoint.

    transformers fuses experts and renames modules in memory. What it does is found out by taking it
    back on tensors that hold positions, one tensor of each kind of layer at a time.

    Args:
        model: loaded from a checkpoint.
        family: its table.

    Returns:
        Name in memory to its layout; tensors that share memory have one.
    """
    held = _Names(model, family)
    known: dict[tuple[str, torch.Size], dict[str, Any]] = {}
    found: dict[str, Layout] = {}
    tied: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = tied.setdefault(id(tensor), name)
        if first != name:
            found[name] = found[first]
            continue
        kind = (held.plain(name), tensor.shape)
        if kind not in known:
            known[kind] = {"layout": _layout(model, family, name, tensor.shape)}
        found[name] = known[kind]["layout"]
    return found


class _Names:
    """Names of a model's tensors without the number of their layer."""

    def __init__(self, model: Any, family: Family) -> None:
        layers = layer_list(model, family)
        self.path = next(name for name, module in model.named_modules() if module is layers)

    def split(self, name: str) -> tuple[int | None, str]:
        """The layer that a name is of, and the rest of it."""
        prefix = f"{self.path}."
        if not name.startswith(prefix):
            return None, name
        number, _, rest = name.removeprefix(prefix).partition(".")
        return int(number), rest

    def plain(self, name: str) -> str:
        layer, rest = self.split(name)
        return rest if layer is None else f"#.{rest}"


def source_name(model: Any, family: Family, name: str, layers: tuple[int, ...]) -> str:
    """The name that a tensor of a model of some layers had in the whole one."""
    names = _Names(model, family)
    layer, rest = names.split(name)
    return name if layer is None else f"{names.path}.{layers[layer]}.{rest}"


def _layout(model: Any, family: Family, name: str, shape: torch.Size) -> Layout:
    dims: list[tuple[Part, ...]] = []
    first = ""
    for position, size in enumerate(shape):
        along = torch.arange(size, dtype=torch.float32)
        places = along.reshape([-1 if i == position else 1 for i in range(len(shape))])
        stored = revert_weight_conversion(model, {name: places.expand(shape)})
        first = first or min(stored)
        dims.append(() if size == 1 else _parts(family, stored))
    if not shape:
        first = min(revert_weight_conversion(model, {name: torch.zeros(shape)}))
    return Layout(first, tuple(dims))


def _parts(family: Family, stored: Mapping[str, Tensor]) -> tuple[Part, ...]:
    """The parts along a dimension, found from the positions that stored tensors hold."""
    parts: dict[Any, Part] = {}
    units: dict[Any, dict[int, int]] = {}
    for name, tensor in stored.items():
        found = find_row(family, name)
        assert found is not None, f"{name} is of a model whose table does not know it"
        row, numbers = found
        lines = {j: _line(tensor, j) for j in range(tensor.dim()) if tensor.shape[j] > 1}
        varying = [j for j, line in lines.items() if line[0] != line[-1]]
        assert len(varying) <= 1, f"{name}: transformers mixes its dimensions in memory"
        if varying:
            j = varying[0]
            parts.setdefault((row.pattern, j), (row.dims[j], lines[j].long()))
            continue
        (owner,) = [unit for unit in numbers if unit != family.layer]
        places = units.setdefault(family.indexed[owner].name, {})
        places[numbers[owner]] = int(tensor.flatten()[0])
    for axis, numbered in units.items():
        dim = torch.tensor([numbered[unit] for unit in sorted(numbered)])
        parts[axis] = (((axis,),), dim)
    # what lies side by side along one dimension has the same positions along the others
    return tuple({tuple(part[1].tolist()): part for part in parts.values()}.values())


def _line(tensor: Tensor, position: int) -> Tensor:
    """The entries along one dimension, at the beginning of the others."""
    for other in reversed(range(tensor.dim())):
        if other != position:
            tensor = tensor.select(other, 0)
    return tensor
