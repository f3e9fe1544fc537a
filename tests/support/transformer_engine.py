"""A stand-in for Transformer Engine, which needs CUDA: its names, its predicates, and what its FP8 refuses.

Products are torch's. Behaviour as in Transformer Engine 2.16: ``quantization.py``, ``utils.py`` and
``csrc/quantizer.cpp``; before 2.8 the predicates are those of ``FP8GlobalStateManager``.
"""

import contextlib
import math
import sys
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from nemo_minitron.training import transformer_engine as used

RECIPES = ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling")


class Device:
    """A card of a compute capability."""

    def __init__(self, capability, old=False):
        self.capability, self.old, self.recipe, self.seen = capability, old, None, set()

    def support(self, kind):
        at = self.capability
        return {
            "fp8": (at >= (8, 9), "Device compute capability 8.9 or higher required for FP8 execution."),
            "mxfp8": ((10, 0) <= at < (12, 0), "Device compute capability 10.0 or higher required for MXFP8 execution."),
            "fp8_block_scaling": (at >= (9, 0), "FP8 block scaled GEMM requires compute capability 9.0 or higher"),
        }[kind]  # fmt: skip

    def default(self):
        if self.support("mxfp8")[0]:
            return "MXFP8BlockScaling"
        return "Float8CurrentScaling" if self.capability >= (12, 0) else "DelayedScaling"

    @contextlib.contextmanager
    def autocast(self, enabled=False, recipe=None):
        before, self.recipe = self.recipe, type(recipe).__name__ if enabled else None
        self.seen.add(self.recipe)
        try:
            yield
        finally:
            self.recipe = before

    def check(self, tokens, width, backward):
        """What a product in FP8 refuses."""
        rows = {"MXFP8BlockScaling": 32, "Float8BlockScaling": 128}.get(self.recipe)
        least, wide = rows or (16 if backward else 8), rows or 16
        assert tokens % least == 0 and width % wide == 0, (
            f"FP8 execution requires ... {tokens, width}"
        )


def linear(device):
    class Linear(nn.Linear):
        def __init__(self, in_features, out_features, bias, params_dtype, device):
            super().__init__(in_features, out_features, bias, device=device, dtype=params_dtype)
            self.steps = 0

        def forward(self, x):
            tokens, recipe = math.prod(x.shape[:-1]), device.recipe
            self.steps += 1
            if recipe is None:
                return super().forward(x)
            device.check(tokens, x.shape[-1], False)
            device.check(8 * 16, self.out_features, False)
            if torch.is_grad_enabled():
                device.check(tokens, x.shape[-1], True)
            return super().forward(x)

        def get_extra_state(self):
            return torch.ones(self.steps)

        def set_extra_state(self, state):
            raise RuntimeError("Refusing to load pickled state")

    return Linear


class RMSNorm(nn.Module):
    def __init__(self, width, eps, zero_centered_gamma, dtype, device):
        super().__init__()
        self.eps, self.offset = eps, int(zero_centered_gamma)
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))

    def forward(self, x):
        return (
            x
            * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            * (self.weight + self.offset)
        )


def install(monkeypatch, capability, old=False):
    """Lets ``import transformer_engine`` find the stand-in; returns its device."""
    device = Device(capability, old)
    top, te, common, recipe = map(ModuleType, (
        "transformer_engine", "transformer_engine.pytorch", "transformer_engine.common", "transformer_engine.common.recipe",
    ))  # fmt: skip
    top.__version__ = "2.3.0" if old else "2.16.1"
    for name in RECIPES[:3] if old else RECIPES:
        setattr(recipe, name, type(name, (), {}))
    te.Linear, te.RMSNorm = linear(device), RMSNorm
    default = lambda: getattr(recipe, device.default())()  # noqa: E731
    kinds = ("fp8", "mxfp8", "fp8_block_scaling")
    if old:
        fp8 = ModuleType("transformer_engine.pytorch.fp8")
        asked = {
            f"is_{kind}_available": staticmethod(lambda kind=kind: device.support(kind))
            for kind in kinds[:2]
        }
        fp8.FP8GlobalStateManager = type("FP8GlobalStateManager", (), asked)
        fp8.get_default_fp8_recipe = default
        te.fp8_autocast = lambda enabled=True, fp8_recipe=None: device.autocast(enabled, fp8_recipe)
        monkeypatch.setitem(sys.modules, fp8.__name__, fp8)
    else:
        te.autocast, te.get_default_recipe = device.autocast, default
        for kind in kinds:
            answer = lambda return_reason=False, kind=kind: (  # noqa: E731
                device.support(kind) if return_reason else device.support(kind)[0]
            )
            setattr(te, f"is_{kind}_available", answer)
    top.pytorch, top.common, common.recipe = te, common, recipe
    for module in (top, te, common, recipe):
        module.__spec__ = SimpleNamespace(name=module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(used, "has_gpu", lambda: True)
    return device
