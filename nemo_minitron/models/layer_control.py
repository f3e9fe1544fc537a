"""torch hooks: skips layers of a decoder, or feeds them by hand; works for every family.

Nothing of the decoder's own code is repeated: embeddings, masks, position embeddings and the final
norm are its own, each layer gets the arguments that it would get.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.families import Family
from nemo_minitron.models.causal_lm import hidden_states, layers_of
from nemo_minitron.models.module_hooks import first_input, first_output


class LayerControl:
    """Control over the layers of one model.

    Attributes:
        skip: layers that hand on what they get.
        inject: layer to the hidden states that it gets in the place of its input.
        inputs: what each layer got in the last forward pass, where ``catch`` is set.
        output: what the last layer that ran gave, where ``catch`` is set.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._model, self._family = model, family
        self._modules = layers_of(model, family)
        self._in_tuples = False
        self.skip: frozenset[int] = frozenset()
        self.inject: Mapping[int, Tensor] = {}
        self.catch = False
        self.inputs: list[Tensor | None] = [None] * len(self._modules)
        self.output: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator["LayerControl"]:
        """Active during the block; attach it before hooks that read the layers' inputs.

        It begins with a forward pass of a few tokens through all layers.
        """
        handles = []
        for layer, module in enumerate(self._modules):
            handles.append(
                module.register_forward_pre_hook(partial(self._before, layer), with_kwargs=True)
            )
            module.forward = partial(self._forward, layer, module.forward)
        try:
            self._learn_form()
            yield self
        finally:
            for handle, module in zip(handles, self._modules, strict=True):
                handle.remove()
                del module.forward  # uncovers the method of its class
            self.inputs = [None] * len(self._modules)
            self.output = None

    def _learn_form(self) -> None:
        """Finds out in what form layers return hidden states, which those that are left out must keep to.

        The first layer may be one of them, and its own result shows nothing.
        """
        skip, self.skip = self.skip, frozenset()
        device = next(self._model.parameters()).device
        with torch.no_grad():
            hidden_states(
                self._model, self._family, torch.zeros(1, 4, dtype=torch.long, device=device)
            )
        self.skip = skip

    def _before(
        self, layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if layer in self.inject:
            fed = self.inject[layer]
            args, kwargs = (
                ((fed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fed})
            )
        if self.catch:
            self.inputs[layer] = first_input(args, kwargs)
        return args, kwargs

    def _forward(self, layer: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        if layer in self.skip:
            hidden = first_input(args, kwargs)
            return (hidden,) if self._in_tuples else hidden
        result = original(*args, **kwargs)
        self._in_tuples = isinstance(result, tuple)
        if self.catch:
            self.output = first_output(result)
        return result
