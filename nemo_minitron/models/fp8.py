"""torch: a frozen model's projections multiplied in eight-bit floating point, for a fast teacher."""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.security.plain_text import plain

KEY = "distill.teacher_dtype=fp8"
MULTIPLE = 16
"""What the product asks of both sizes of a weight."""

_LARGEST = 448.0  # of float8_e4m3fn
_FEW = 16  # rows below which a kernel of their own does not pay

Quantised = tuple[Tensor, Tensor]
"""Rows [rows, columns] in float8_e4m3fn, and their scales [rows, 1] in float32."""


def quantise_rows(x_TI: Tensor) -> Quantised:
    """Each row as s q with s = max |x| / 448: one read and one write where it is compiled.

    Numbers that are not finite stay so.
    """
    x_TI = x_TI.float()
    scale_T1 = (x_TI.abs().amax(1, keepdim=True) / _LARGEST).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return (x_TI / scale_T1).to(torch.float8_e4m3fn), scale_T1


@functools.cache
def one_kernel(device: str) -> Callable[[Tensor], Quantised]:
    """``quantise_rows`` as one kernel; step by step, which is slower, where nothing compiles."""
    compiled: Callable[[Tensor], Quantised] = torch.compile(quantise_rows, dynamic=True)
    tried = torch.ones(2 * _FEW, MULTIPLE, device=device)
    torch._dynamo.mark_static(tried, 1)
    try:
        compiled(tried)
    except Exception as error:  # whatever compilers raise
        cause = getattr(error, "inner_exception", error)
        said = f"{type(cause).__name__}: {plain(cause, 200)}"
        print(f"{KEY}: no compiled kernel here, and slower without one ({said})", file=sys.stderr)
        return quantise_rows
    return compiled


def quantised(x_TI: Tensor) -> Quantised:
    """``quantise_rows``, compiled on a GPU; inside of what is compiled anyway, a part of it."""
    if torch.compiler.is_compiling() or not x_TI.is_cuda or x_TI.shape[0] < _FEW:
        return quantise_rows(x_TI)
    torch._dynamo.mark_static(x_TI, 1)  # one kernel for each width, whatever the number of rows
    return one_kernel(x_TI.device.type)(x_TI)


class SharedInput:
    """What the projections of one input (queries, keys, values) share: its rows in eight bits.

    It is kept as long as the very tensor lives that it was made of. A thread finds all of it, or
    nothing.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, int, Quantised] | None = None

    def quantised(self, x: Tensor) -> Quantised:
        """The rows of ``x`` [..., inputs]."""
        held, version = self._held, _version(x)
        if held is not None and held[0]() is x and held[1] == version:
            return held[2]
        made = quantised(x.reshape(-1, x.shape[-1]))
        self._held = (weakref.ref(x, self._forget), version, made)
        return made

    def _forget(self, gone: Any) -> None:
        held = self._held
        if held is not None and held[0] is gone:
            self._held = None


def _version(x: Tensor) -> int:
    """Counts changes in place; tensors of inference mode have no count, and a frozen model changes none."""
    return -1 if x.is_inference() else x._version


class Fp8Linear(nn.Module):
    """A linear layer whose weight is float8_e4m3fn with one scale per output channel.

    w = s q with s = max |w| / 448 over a row; so are the rows of the input, with scales that are
    found again every time. The product of both q runs on the card's tensor cores, which sum in
    float32, scale and round to bfloat16. The CPU, which has no such product, computes the same from
    the numbers in float32. It has no gradient.
    """

    def __init__(self, linear: nn.Linear, shared: SharedInput | None = None) -> None:
        """Quantises a layer.

        Args:
            linear: its weight is of shape [outputs, inputs], both multiples of ``MULTIPLE``.
            shared: of the layers that may get the same input; None: it stands alone.
        """
        super().__init__()
        assert fits(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantised_OI, scale_O1 = quantise_rows(linear.weight.detach())
        self.register_buffer("quantised_OI", quantised_OI)
        self.register_buffer("scale_O", scale_O1[:, 0].contiguous())
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.register_buffer("bias", bias)
        self._dtype, self._shared = linear.weight.dtype, shared

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix [outputs, inputs], which fused Mamba kernels read."""
        return (self.quantised_OI.float() * self.scale_O[:, None]).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        place, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(place):
            dtype = torch.get_autocast_dtype(place)
        if self._shared is None or torch.compiler.is_compiling():
            x_TI, scale_T1 = quantised(x.reshape(-1, self.in_features))
        else:
            x_TI, scale_T1 = self._shared.quantised(x)
        product_TO = self._product(x_TI, scale_T1).to(dtype)
        return product_TO.reshape(*x.shape[:-1], self.out_features)

    def _product(self, x_TI: Tensor, scale_T1: Tensor) -> Tensor:
        if x_TI.is_cuda:
            return torch._scaled_mm(
                x_TI, self.quantised_OI.t(), scale_a=scale_T1, scale_b=self.scale_O[None],
                bias=self.bias, out_dtype=torch.bfloat16, use_fast_accum=True,
            )  # fmt: skip
        check_device(x_TI.device)
        with torch.autocast(x_TI.device.type, enabled=False):
            product_TO = x_TI.float() @ self.quantised_OI.float().t() * (scale_T1 * self.scale_O)
        if self.bias is not None:
            product_TO = product_TO + self.bias.float()
        return product_TO.to(torch.bfloat16)


def fits(linear: nn.Linear) -> bool:
    """Whether the product takes the layer's sizes."""
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


def fp8_layers(linears: list[nn.Linear]) -> list[nn.Module]:
    """The linear layers of one module in eight bits, in order; those whose sizes do not fit stay.

    Those with equally wide inputs share one, if they get one.
    """
    widths = [linear.in_features for linear in linears if fits(linear)]
    shared = {width: SharedInput() for width in widths if widths.count(width) > 1}
    return [
        Fp8Linear(linear, shared.get(linear.in_features)) if fits(linear) else linear
        for linear in linears
    ]


def check_device(device: torch.device) -> None:
    """Refuses a device that has no such product; the CPU's is made of others.

    Raises:
        ValueError: it has none.
    """
    if device.type == "cpu":
        return
    use = "use distill.teacher_dtype=int8, which saves memory, or bfloat16"
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(
            f"{KEY}: expected a CUDA device of compute capability 8.9 or more, found {device.type}"
            f"{' of another maker' if device.type == 'cuda' else ''}; {use}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        major, minor = capability
        raise ValueError(
            f"{KEY}: expected a CUDA device of compute capability 8.9 (Ada, Hopper and later), found "
            f"{torch.cuda.get_device_name(device)} of {major}.{minor}; {use}"
        )
