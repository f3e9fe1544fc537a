"""transformers: routed experts computed one after the other, with what each did in sight.

In memory the experts of a layer are one module, its forward a function that can be chosen by name
(transformers.integrations.moe.ExpertsInterface). The one registered here multiplies what the default
implementation does, expert by expert, and shows each one's activations.

Shape suffixes: T tokens, K experts per token, H hidden channels, U neurons of an expert.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "minitron_watched"
_ATTRIBUTE = "_minitron_visit"


@dataclass(frozen=True)
class Visit:
    """What one expert did in one forward pass.

    Attributes:
        expert, experts: its number, of how many; they come in order, none is left out.
        token_T: positions (flattened over the batch) that were routed to it.
        neurons_TU: input of its down projection.
        weighted_TH: its output times the routing weights.
    """

    expert: int
    experts: int
    token_T: Tensor
    neurons_TU: Tensor
    weighted_TH: Tensor


@contextmanager
def watched(model: Any, visits: Mapping[str, Callable[[Visit], None]]) -> Iterator[None]:
    """Shows what the experts do, for the length of the block.

    Args:
        model: a causal LM.
        visits: path of an experts module to what is called with each ``Visit``.
    """
    if not visits:
        yield
        return
    before = model.config._experts_implementation
    modules = [(model.get_submodule(path), visit) for path, visit in visits.items()]
    model.set_experts_implementation(_NAME)
    for module, visit in modules:
        setattr(module, _ATTRIBUTE, visit)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for module, _ in modules:
            delattr(module, _ATTRIBUTE)


def _forward(module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum over experts of routing weight x expert(hidden), Tensor of shape [tokens, hidden]."""
    visit: Callable[[Visit], None] | None = getattr(module, _ATTRIBUTE, None)
    gated = hasattr(module, "gate_up_proj")
    first, second = "gate_up_proj" if gated else "up_proj", "down_proj"
    experts = getattr(module, second).shape[0]
    out_TH = torch.zeros_like(hidden_TH, dtype=torch.promote_types(hidden_TH.dtype, weight_TK.dtype))
    for expert in range(experts):
        token_T, place_T = torch.where(index_TK == expert)
        inner_TU = _linear(module, first, expert, hidden_TH[token_T])
        neurons_TU = module._apply_gate(inner_TU) if gated else module.act_fn(inner_TU)
        given_TH = _linear(module, second, expert, neurons_TU) * weight_TK[token_T, place_T, None]
        out_TH.index_add_(0, token_T, given_TH.to(out_TH.dtype))
        if visit is not None:
            visit(Visit(expert, experts, token_T, neurons_TU, given_TH))
    return out_TH.to(hidden_TH.dtype)


def _linear(module: nn.Module, name: str, expert: int, x_TU: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias", None)
    result = x_TU @ weight if getattr(module, "is_transposed", False) else nn.functional.linear(x_TU, weight)
    return result if bias is None else result + bias[expert]


ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
