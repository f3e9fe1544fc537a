"""torch.compile, layer by layer: one kernel in the place of many small ones that wait for memory.

A layer's ``forward`` is compiled, not the layer, so that hooks on it (FSDP2's, those of intermediate
losses) stay outside. Layers of one shape share what was compiled.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from nemo_minitron.families import Architecture, Family
from nemo_minitron.models.causal_lm import layers_of

_VARIANTS = 8
"""Most graphs of layers of one shape.

Training, validation and its last batch, each again where weights or the attention's window differ.
"""


def is_compiled(choice: str, device: torch.device, alone: bool) -> bool:
    """Whether layers are compiled.

    Args:
        choice: ``training.compile``.
        device: where the model is trained.
        alone: whether the layers are the model's own, and not split by tensor parallelism.
    """
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and alone and find_spec("triton") is not None


class Compiled:
    """The compiled layers of one model, until ``undo``.

    Where a layer cannot be compiled, a line on stderr says so, and the model's layers run as they are.

    Attributes:
        layers: those that are compiled. Others have routed experts, whose products have other sizes in
            every step, or hooks inside.
        failed: whether one of them could not be.
    """

    def __init__(self, model: Any, family: Family, whose: str, backend: Any = "inductor") -> None:
        """Puts compiled functions in the place of the layers' ``forward``.

        Args:
            model: a Hugging Face causal LM.
            family: its family.
            whose: what a message calls it.
            backend: torch's name of the compiler, or a function that is one.
        """
        architecture = Architecture(family, model.config.to_dict())
        layers = layers_of(model, family)
        self._of = len(layers)
        routed = architecture.present.get("experts", [])
        self.layers = [
            layer
            for number, layer in enumerate(layers)
            if number not in routed and not _is_hooked_inside(layer)
        ]
        self._whose, self.failed = whose, False
        _allow_graphs(self.layers)
        for layer in self.layers:
            layer.forward = self._compiled(layer.forward, backend)  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"compiles {len(self.layers)} of {self._of} layers of the {self._whose}"

    def undo(self) -> None:
        """Gives the layers their own ``forward`` back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def _compiled(self, forward: Callable[..., Any], backend: Any) -> Callable[..., Any]:
        # no dynamic shapes: all batches but the last one of a validation have the same
        fast = torch.compile(forward, dynamic=False, backend=backend)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return forward(*args, **kwargs)
            try:
                return fast(*args, **kwargs)
            except TorchDynamoException as error:
                self.failed = True
                reason = " ".join(str(error).split()[:40])
                print(
                    f"training.compile: the {self._whose}'s layers cannot be compiled and run as they are: "
                    f"{type(error).__name__}: {reason}",
                    file=sys.stderr,
                    flush=True,
                )
                return forward(*args, **kwargs)

        return run


def _is_hooked_inside(layer: nn.Module) -> bool:
    inside = [module for module in layer.modules() if module is not layer]
    return any(module._forward_hooks or module._forward_pre_hooks for module in inside)


def _allow_graphs(layers: Sequence[nn.Module]) -> None:
    """Lets torch compile what these layers need; beyond its limit it would compile no more, unnoticed.

    And errors of the backward pass come with the forward pass, where something can be done about them.
    """
    shapes = {
        (type(layer), tuple((name, tuple(w.shape)) for name, w in layer.named_parameters()))
        for layer in layers
    }
    dynamo: Any = torch._dynamo.config
    for name in ("cache_size_limit", "accumulated_cache_size_limit"):
        setattr(dynamo, name, getattr(dynamo, name) + _VARIANTS * len(shapes))
    functorch: Any = torch._functorch.config  # type: ignore[attr-defined]
    if hasattr(functorch, "force_non_lazy_backward_lowering"):
        functorch.force_non_lazy_backward_lowering = True
