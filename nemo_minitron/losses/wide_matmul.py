"""Matrix products of low-precision operands whose result and sums stay in float32.

A product of bfloat16 matrices comes out rounded to 8 bits, and a loss made of such logits has
gradients that are wrong by a hundredth. The hardware could do better: it adds up in float32 and
rounds at the end. CUDA leaves the rounding out where ``out_dtype`` asks for it. The CPU's float32
product may take its operands as bfloat16 (``torch.backends.mkldnn.matmul.fp32_precision``), which
changes nothing in operands that were
bfloat16: it runs at bfloat16's speed and yields float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 2 * 2**20
"""Of a large operand so much is widened to float32 at a time that it stays in the cache."""
WIDENS = {"cuda"}
"""Devices whose products of low-precision operands come out in float32 where that is asked for."""
NARROW = {"mps"}
"""Devices without float64."""
_SETTING = Lock()


def wide_linear(hidden_CH: Tensor, weight_VH: Tensor, place_CV: Tensor | None = None) -> Tensor:
    """Hidden @ weight transposed, Tensor of shape [rows, vocabulary] in float32 (float64 of float64).

    Args:
        hidden_CH: Tensor of shape [rows, hidden].
        weight_VH: Tensor of shape [vocabulary, hidden], of the same dtype.
        place_CV: its first rows take the result, in its dtype; None: new memory.
    """
    rows, dtype = hidden_CH.shape[0], hidden_CH.dtype
    if place_CV is not None and place_CV.dtype != wide_dtype(dtype):
        return place_CV[:rows].copy_(wide_linear(hidden_CH, weight_VH))
    if place_CV is None:
        place_CV = hidden_CH.new_empty((rows, weight_VH.shape[0]), dtype=wide_dtype(dtype))
    out_CV = place_CV[:rows]
    if not _is_low(dtype):
        return torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    if hidden_CH.device.type in WIDENS:
        return torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32, out=out_CV)
    wide_CH = hidden_CH.float()
    with _as_stored(dtype):
        for part in _tiles(weight_VH):
            torch.mm(wide_CH, weight_VH[part].float().T, out=out_CV[:, part])
    return out_CV


def add_products(
    grad_CV: Tensor,
    hidden_CH: Tensor,
    weight_VH: Tensor,
    sum_CH: Tensor,
    sum_VH: Tensor | None,
    fresh: bool = False,
) -> None:
    """Both gradients of a linear map, added to ``sum_CH`` and ``sum_VH`` in place.

    Args:
        grad_CV: gradient by its results, Tensor of shape [rows, vocabulary], of the sums' dtype (on
            CUDA of the operands').
        hidden_CH: what it was given, [rows, hidden].
        weight_VH: its weight, [vocabulary, hidden].
        sum_CH: takes grad @ weight; float32 (float64 for float64 operands).
        sum_VH: takes grad transposed @ hidden; likewise. None: not wanted.
        fresh: whether nothing has been added to ``sum_VH``, which is zero then, or, where
            ``writes_fresh``, anything.
    """
    if writes_fresh(hidden_CH):
        low_CV = grad_CV.to(hidden_CH.dtype)
        torch.addmm(sum_CH, low_CV, weight_VH, out_dtype=torch.float32, out=sum_CH)
        if sum_VH is not None and fresh:
            torch.mm(low_CV.T, hidden_CH, out_dtype=torch.float32, out=sum_VH)
        elif sum_VH is not None:
            torch.addmm(sum_VH, low_CV.T, hidden_CH, out_dtype=torch.float32, out=sum_VH)
    elif not _is_low(hidden_CH.dtype):
        sum_CH.addmm_(grad_CV, weight_VH)
        if sum_VH is not None:
            sum_VH.addmm_(grad_CV.T, hidden_CH)
    else:
        wide_CH = hidden_CH.float()
        with _as_stored(hidden_CH.dtype):
            for rows in _tiles(weight_VH):
                sum_CH.addmm_(grad_CV[:, rows], weight_VH[rows].float())
                if sum_VH is not None:
                    sum_VH[rows].addmm_(grad_CV[:, rows].T, wide_CH)


def writes_fresh(operand: Tensor) -> bool:
    """Whether the first of a sum's products is written, not added: nothing needs to be zero before."""
    return operand.device.type in WIDENS and _is_low(operand.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 of float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The same in the dtype that sums are kept in."""
    return tensor.to(wide_dtype(tensor.dtype))


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of scalars that are sums over many tokens: float64 where the device has it."""
    return torch.float32 if device.type in NARROW else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """The same in float64; on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type in NARROW else tensor).double()


def scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix x scale in another dtype, rounded once, without a copy in between."""
    result = torch.empty_like(tensor, dtype=dtype)
    if dtype == tensor.dtype or tensor.device.type != "cpu":
        return torch.mul(tensor, scale, out=result)
    for rows in _tiles(tensor):  # the CPU casts a result by way of a temporary of its size
        torch.mul(tensor[rows], scale, out=result[rows])
    return result


def _is_low(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _tiles(matrix_VH: Tensor) -> Iterator[slice]:
    """Rows of the matrix that take ``TILE_BYTES`` in float32."""
    step = max(64, TILE_BYTES // (4 * max(1, matrix_VH.shape[1])))
    return (slice(start, start + step) for start in range(0, matrix_VH.shape[0], step))


@contextmanager
def _as_stored(dtype: torch.dtype) -> Iterator[None]:
    """The CPU takes float32 operands that hold bfloat16 values as such (torch 2.9 or newer).

    The setting is the process's: one thread at a time changes it.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
        yield
        return
    with _SETTING:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
