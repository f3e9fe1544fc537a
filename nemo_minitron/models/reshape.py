"""torch: gives a model in memory the shape and weights of a smaller one, and leaves it what it is.

Modules and parameters stay the objects that they are, so what others hold of them goes on to work:
an optimiser, hooks, a callback. What was set on them (``requires_grad``, dtypes, gradient
checkpointing, attributes) stays, too; what follows from the configuration is the smaller model's.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_REGISTERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")


def reshape(model: Any, smaller: Any, layers: nn.Module, kept: Sequence[int]) -> None:
    """Makes ``model`` what ``smaller`` is, in place.

    Args:
        model: a Hugging Face model; of a module that stands in the place of one of its own, the
            parameters have the same names.
        smaller: one of the same class, which is used up.
        layers: the module whose children are the layers of ``model``.
        kept: the layers that stay, one for each of ``smaller``.

    Raises:
        ValueError: a module has other parameters than the class gives it; nothing is changed.
    """
    with torch.device("meta"):  # to tell what was set from what the configuration says
        fresh = type(model)(copy.deepcopy(model.config))
    found = list(_matched(model, smaller, fresh, layers, list(kept), ""))
    for old, new, as_made, children in found:
        _take_attributes(old, new, as_made)
        _take_tensors(old, new)
        own = {
            name: child
            for name, child in old._modules.items()
            if name not in as_made._modules and name not in new._modules
        }
        old._modules.clear()
        old._modules.update({**children, **own})


Match = tuple[nn.Module, nn.Module, nn.Module, dict[str, nn.Module | None]]
"""A module, its smaller counterpart, as the configuration makes it, and the children that it gets."""


def _matched(
    old: nn.Module, new: nn.Module, fresh: nn.Module, layers: nn.Module, kept: list[int], path: str
) -> Iterator[Match]:
    """Every module that stays."""
    if set(old._parameters) != set(new._parameters):
        raise ValueError(
            f"{path}: {type(old).__name__} stands where the model has {type(fresh).__name__}, and has other "
            "parameters; put the model's own layer back before it is pruned"
        )
    children: dict[str, nn.Module | None] = {}
    for name, child in new._modules.items():
        source = str(kept[int(name)]) if old is layers else name
        ours, made = old._modules.get(source), fresh._modules.get(source)
        if child is None or ours is None or made is None:
            children[name] = child
            continue
        children[name] = ours
        yield from _matched(ours, child, made, layers, kept, f"{path}.{source}".lstrip("."))
    yield old, new, fresh, children


def _take_attributes(old: nn.Module, new: nn.Module, fresh: nn.Module) -> None:
    for name, value in new.__dict__.items():
        if name in _REGISTERS or "_hook" in name:
            continue
        set_by_configuration = name in fresh.__dict__ and not _same(value, fresh.__dict__[name])
        if set_by_configuration or name not in old.__dict__:
            old.__dict__[name] = value


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    if type(one) is not type(other):
        return False
    if isinstance(
        one, transformers.PreTrainedConfig
    ):  # one with values by layer does not compare itself
        return bool(one.to_dict() == other.to_dict())
    return bool(one == other)


def _take_tensors(old: nn.Module, new: nn.Module) -> None:
    for name, parameter in new._parameters.items():
        ours = old._parameters[name]
        if ours is None or parameter is None:
            old._parameters[name] = parameter
            continue
        ours.data = parameter.data.to(device=ours.device, dtype=ours.dtype)
        ours.grad = None
    for name, buffer in new._buffers.items():
        before = old._buffers.get(name)
        if before is None or buffer is None:
            old._buffers[name] = buffer
        else:
            old._buffers[name] = buffer.to(device=before.device, dtype=before.dtype)
    old._non_persistent_buffers_set = set(new._non_persistent_buffers_set)
