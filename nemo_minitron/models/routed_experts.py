"""transformers: computes routed experts one by one, and shows what each did.

In memory the experts of a layer are one module whose forward pass multiplies all of them at once.
While they are watched, the module does the same expert by expert, and shows each one's activations.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


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
    modules = [(model.get_submodule(path), visit) for path, visit in visits.items()]
    for module, visit in modules:
        module.forward = partial(_forward, module, visit)
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward  # uncovers the method of its class


def _forward(
    module: nn.Module,
    visit: Callable[[Visit], None],
    hidden_TH: Tensor,
    index_TK: Tensor | None = None,
    weight_TK: Tensor | None = None,
) -> Tensor:
    """Sum over experts of routing weight x expert(hidden), Tensor of shape [tokens, hidden]."""
    if index_TK is None or weight_TK is None:
        return _forward_weighted(module, visit, hidden_TH)
    gated = hasattr(module, "gate_up_proj")
    first, second = "gate_up_proj" if gated else "up_proj", "down_proj"
    experts = getattr(module, second).shape[0]
    out_TH = torch.zeros_like(
        hidden_TH, dtype=torch.promote_types(hidden_TH.dtype, weight_TK.dtype)
    )
    for expert, (token_T, place_T) in enumerate(_routes(index_TK, experts)):
        inner_TU = _linear(module, first, expert, hidden_TH[token_T])
        neurons_TU = _activated(module, inner_TU) if gated else module.act_fn(inner_TU)
        given_TH = _linear(module, second, expert, neurons_TU) * weight_TK[token_T, place_T, None]
        out_TH.index_add_(0, token_T, given_TH.to(out_TH.dtype))
        visit(Visit(expert, experts, token_T, neurons_TU, given_TH))
    return out_TH.to(hidden_TH.dtype)


def _forward_weighted(
    module: nn.Module, visit: Callable[[Visit], None], hidden_NH: Tensor
) -> Tensor:
    """Experts that get every token, multiplied by its routing weight: of zeros where it is not theirs.

    ``hidden_NH`` and the result hold all tokens for the first expert, then all for the second: Tensor
    of shape [experts x tokens, hidden].
    """
    hidden_ETH = hidden_NH.unflatten(0, (module.down_proj.shape[0], -1))  # type: ignore[arg-type]
    out_ETH = torch.zeros_like(hidden_ETH)
    for expert, hidden_TH in enumerate(hidden_ETH):
        token_T = hidden_TH.any(-1).nonzero()[:, 0]
        inner_TU = hidden_TH[token_T] @ module.gate_up_proj[expert]  # type: ignore[index, operator]
        neurons_TU = _activated(module, inner_TU)
        given_TH = neurons_TU @ module.down_proj[expert]  # type: ignore[index, operator]
        out_ETH[expert, token_T] = given_TH
        visit(Visit(expert, len(hidden_ETH), token_T, neurons_TU, given_TH))
    return out_ETH.flatten(0, 1)


def _routes(index_TK: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """For each expert the tokens that came to it, ascending, and the place of the expert among theirs.

    How many came to each decides the shapes of what follows, so the device is waited for: once a
    layer, for all experts.
    """
    known = (index_TK >= 0) & (index_TK < experts)
    owner_N = index_TK.where(known, index_TK.new_full((), experts)).flatten()
    order_N = owner_N.argsort(stable=True)
    count_E = (owner_N[:, None] == torch.arange(experts, device=owner_N.device)).sum(0)
    token_N, place_N = order_N // index_TK.shape[1], order_N % index_TK.shape[1]
    counts = count_E.tolist()
    rest = len(order_N) - sum(counts)
    parts = zip(token_N.split([*counts, rest]), place_N.split([*counts, rest]), strict=True)
    return list(parts)[:experts]


def _activated(module: nn.Module, inner_TU: Tensor) -> Tensor:
    """Gate and up to neurons, as the module itself has it, or the usual way."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(inner_TU)
    gate_TU, up_TU = inner_TU.chunk(2, dim=-1)
    return module.act_fn(gate_TU) * up_TU


def _linear(module: nn.Module, name: str, expert: int, x_TU: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias", None)
    across = weight.shape[-1] != x_TU.shape[-1]  # square: as the module says
    transposed = getattr(module, "is_transposed", across)
    result = x_TU @ weight if transposed else nn.functional.linear(x_TU, weight)
    return result if bias is None else result + bias[expert]
