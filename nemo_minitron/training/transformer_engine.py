"""Transformer Engine: its linear layers and norms in the place of a model's, and products in FP8.

The layers that take over hold the very parameters of those they replace, under the same names. So
optimiser and checkpoints see the same model, and ``LayerReplacement.undone`` is the Hugging Face model
again.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.families import Family
from nemo_minitron.models.causal_lm import layers_of
from nemo_minitron.training.fp8_recipes import Fp8Recipe, choose

EXTRA_STATE = "_extra_state"
"""How names of what Transformer Engine keeps beside parameters end: scales of FP8, of no use to others."""
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_MULTIPLE = 16  # of both dimensions: what is exchanged without FP8, as with its most common recipes


@dataclass(frozen=True)
class Norm:
    """The formula of a norm, found by trying.

    Attributes:
        layer: whether it takes the mean off (LayerNorm) or not (RMSNorm).
        zero_centred: whether the gain is the weight + 1.
        eps: added to the variance.
    """

    layer: bool
    zero_centred: bool
    eps: float

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The norm over the last dimension of ``x``."""
        centred = x - x.mean(-1, keepdim=True) if self.layer else x
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        result = normed * (weight + 1 if self.zero_centred else weight)
        return result if bias is None else result + bias


@dataclass(frozen=True)
class ReplacementLayers:
    """Functions that make the replacing layers.

    Attributes:
        linear: of a linear layer.
        norm: of a norm and its formula.
        context: what the model's passes run under.
        fp8: how the operands of products are scaled; None: they are not in FP8.
    """

    linear: Callable[[nn.Linear], nn.Module]
    norm: Callable[[nn.Module, Norm], nn.Module]
    context: Callable[[], contextlib.AbstractContextManager[Any]]
    fp8: Fp8Recipe | None = None

    @property
    def multiple(self) -> int:
        """What both widths of a linear layer have to be multiples of."""
        return _MULTIPLE if self.fp8 is None else self.fp8.multiple


def norm_formula(module: nn.Module) -> Norm | None:
    """Which norm a module is, or None if it is not a known norm.

    Transformers has a class of its own per family; a copy of it is tried on random numbers instead.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    known = {id(weight), id(bias)}
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    if any(id(parameter) not in known for parameter in module.parameters()) or list(
        module.children()
    ):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gated norm
        return None
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)),
        None,
    )
    if not isinstance(eps, float):
        return None
    tried = copy.deepcopy(module).float().cpu()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tried.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(4, weight.shape[0], generator=generator) + 0.5
        found = tried.forward(x)  # past its hooks
        for layer in (False, True):
            for zero_centred in (False, True):
                norm = Norm(layer, zero_centred, eps)
                expected = norm(x, tried.weight, None if bias is None else tried.bias)
                if torch.allclose(expected, found, rtol=1e-4, atol=1e-4):
                    return norm
    return None


class LayerReplacement:
    """Replaces layers of a model, and restores them.

    The parameters belong to the layers that are in place: those that are not hold none, so that
    weights which are split over ranks afterwards are not kept whole beside. What the new layers
    would store beside their parameters (FP8 scales, which a step makes anew) is left out of every
    state dict: Transformer Engine 2.16 and later refuses to read it back, and a sharded checkpoint
    cannot, because its size changes.

    Attributes:
        linears, norms: how many were exchanged.
        left: linear layers that were not, because FP8 does not take their widths.
    """

    def __init__(self, model: Any, family: Family, kit: ReplacementLayers) -> None:
        """Replaces what can be replaced inside the model's layers; embedding and head stay."""
        self._places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self.linears = self.norms = self.left = 0
        self._kit = kit
        for layer in layers_of(model, family):
            for parent in list(layer.modules()):
                for name, child in list(parent.named_children()):
                    self._exchange(parent, name, child, kit)

    def _exchange(
        self, parent: nn.Module, name: str, child: nn.Module, kit: ReplacementLayers
    ) -> None:
        if type(child) is nn.Linear:
            if child.in_features % kit.multiple or child.out_features % kit.multiple:
                self.left += 1
                return
            new, self.linears = kit.linear(child), self.linears + 1
        else:
            norm = norm_formula(child)
            # Transformer Engine's LayerNorm has a bias, its RMSNorm none
            if norm is None or norm.layer != (getattr(child, "bias", None) is not None):
                return
            new, self.norms = kit.norm(child, norm), self.norms + 1
        _hand_over(child, new)
        new.register_state_dict_post_hook(_forget_extra_state)
        new.register_load_state_dict_post_hook(_miss_no_extra_state)
        for key in _HOOKS:  # of losses on hidden states, which listen to this place
            setattr(new, key, getattr(child, key))
        self._places.append((parent, name, child, new))
        setattr(parent, name, new)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """The model as it was, with the parameters as they are now."""
        for parent, name, old, new in self._places:
            _hand_over(new, old)
            setattr(parent, name, old)
        try:
            yield
        finally:
            for parent, name, old, new in self._places:
                _hand_over(old, new)
                setattr(parent, name, new)

    def __str__(self) -> str:
        """What was exchanged, in words."""
        text = f"{self.linears} linear layers and {self.norms} norms exchanged"
        if self._kit.fp8 is not None:
            text += f", products in FP8 ({self._kit.fp8.name})"
        if self.left:
            text += f"; {self.left} linear layers stay: their widths are no multiples of {self._kit.multiple}"
        return text


def _hand_over(one: nn.Module, other: nn.Module) -> None:
    """Gives a layer's parameters to the other."""
    for key, parameter in list(one.named_parameters(recurse=False)):
        other.register_parameter(key, parameter)
        one.register_parameter(key, None)


def _forget_extra_state(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    state.pop(f"{prefix}{EXTRA_STATE}", None)


def _miss_no_extra_state(_: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(EXTRA_STATE)]


def transformer_engine(fp8: bool, recipe: str = "auto") -> ReplacementLayers:
    """Transformer Engine's layers.

    Args:
        fp8: whether products run in FP8, or in the dtype that they get.
        recipe: how they are scaled then (``training.fp8_recipe``).

    Raises:
        ValueError: it is not installed, there is no GPU that could run it, or none that has FP8 or
            the recipe.
    """
    where = "training.transformer_engine"
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{where}: Transformer Engine is not usable here ({reason}); install it with "
            "pip install 'nemo-minitron[te]' on a machine with CUDA"
        ) from error
    if not has_gpu():
        raise ValueError(f"{where}: Transformer Engine runs on CUDA devices, found none")
    chosen, scaled = choose(te, recipe) if fp8 else (None, None)

    def linear(old: nn.Linear) -> nn.Module:
        weight = old.weight
        new: nn.Module = te.Linear(
            old.in_features, old.out_features, bias=old.bias is not None, params_dtype=weight.dtype,
            device=weight.device if weight.is_cuda else "meta",
        )  # fmt: skip
        return new

    def norm(old: nn.Module, formula: Norm) -> nn.Module:
        weight: Any = old.weight
        kind = te.LayerNorm if formula.layer else te.RMSNorm
        new: nn.Module = kind(
            weight.shape[0], eps=formula.eps, zero_centered_gamma=formula.zero_centred, dtype=weight.dtype,
            device=weight.device if weight.is_cuda else "meta",
        )  # fmt: skip
        return new

    def context() -> contextlib.AbstractContextManager[Any]:
        if not fp8:
            return contextlib.nullcontext()
        if hasattr(te, "autocast"):  # so called since 2.8
            return te.autocast(enabled=True, recipe=scaled)  # type: ignore[no-any-return]
        return te.fp8_autocast(enabled=True, fp8_recipe=scaled)  # type: ignore[no-any-return]

    return ReplacementLayers(linear, norm, context, chosen)


def has_gpu() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()
