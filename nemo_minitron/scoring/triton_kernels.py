# mypy: ignore-errors
"""Triton: sums of activations over positions, and cosines of hidden states, each activation read once.

What this costs at least is memory traffic. Of a llama's layer the taps read two norms' outputs, the
inputs of o_proj and down_proj, the layer's input and its output: 5 hidden + ffn numbers a token
(heads x head_dim = hidden), 2 bytes each in bfloat16; for hidden 576 and ffn 1536 that is 8.8 kB, or
3 ns on an H100, where the layer itself moves about ten times as much. What was just written may come
from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_S, _BLOCK_U = 64, 64
_BLOCK_T, _BLOCK_H = 32, 64
_PROGRAMS = 1024
"""So many programs keep a large GPU busy; where samples and units are fewer, positions are split."""


@triton.jit
def _sums(  # noqa: PLR0913 (a kernel takes pointers and strides one by one)
    x_ptr, mask_ptr, mean_ptr, l2_ptr, var_ptr,
    positions, units, blocks, parts, sample_stride, position_stride, mask_stride,
    MASKED: tl.constexpr, MEAN: tl.constexpr, L2: tl.constexpr, VAR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Sums over one part of one sample's positions: of |x|, of x^2, of (x - mean)^2."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    unit_U = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    inside_U = unit_U < units
    first = part * blocks * BLOCK_S
    size_SU = tl.zeros([BLOCK_S, BLOCK_U], tl.float32)
    square_SU = tl.zeros([BLOCK_S, BLOCK_U], tl.float32)
    count = 0.0
    mean_U = tl.zeros([BLOCK_U], tl.float32)
    apart_U = tl.zeros([BLOCK_U], tl.float32)
    for block in range(0, blocks):
        at_S = first + block * BLOCK_S + tl.arange(0, BLOCK_S)
        valid_S = at_S < positions
        if MASKED:
            flag_S = tl.load(mask_ptr + sample * mask_stride + at_S, mask=valid_S, other=0)
            valid_S = valid_S & (flag_S != 0)
        valid_SU = valid_S[:, None] & inside_U[None, :]
        row_S = x_ptr + sample * sample_stride + at_S.to(tl.int64) * position_stride
        x_SU = tl.load(row_S[:, None] + unit_U[None, :], mask=valid_SU, other=0.0).to(tl.float32)
        if MEAN:
            size_SU += tl.abs(x_SU)
        if L2:
            square_SU += x_SU * x_SU
        if VAR:  # moments of the block, joined with those before it (Chan et al. 1979)
            own = tl.sum(valid_S.to(tl.float32), 0)
            own_U = tl.sum(x_SU, 0) / tl.maximum(own, 1.0)
            gap_SU = tl.where(valid_SU, x_SU - own_U[None, :], 0.0)
            whole = tl.maximum(count + own, 1.0)
            shift_U = own_U - mean_U
            apart_U += tl.sum(gap_SU * gap_SU, 0) + shift_U * shift_U * (count * own / whole)
            mean_U += shift_U * (own / whole)
            count += own
    at_U = (sample * parts + part) * units + unit_U
    if MEAN:
        tl.store(mean_ptr + at_U, tl.sum(size_SU, 0), mask=inside_U)
    if L2:
        tl.store(l2_ptr + at_U, tl.sum(square_SU, 0), mask=inside_U)
    if VAR:
        tl.store(var_ptr + at_U, apart_U, mask=inside_U)


@triton.jit
def _cosines(
    before_ptr, after_ptr, cosine_ptr, tokens, channels, before_stride, after_stride,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The cosine of each token's two hidden states."""
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T = token_T < tokens
    dot_TH = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    before_TH = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    after_TH = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in range(0, channels, BLOCK_H):
        at_H = start + tl.arange(0, BLOCK_H)
        inside_TH = inside_T[:, None] & (at_H < channels)[None, :]
        one_TH = tl.load(
            before_ptr + token_T[:, None] * before_stride + at_H[None, :], mask=inside_TH, other=0.0
        ).to(tl.float32)
        other_TH = tl.load(
            after_ptr + token_T[:, None] * after_stride + at_H[None, :], mask=inside_TH, other=0.0
        ).to(tl.float32)
        dot_TH += one_TH * other_TH
        before_TH += one_TH * one_TH
        after_TH += other_TH * other_TH
    norms_T = tl.sqrt(tl.sum(before_TH, 1)) * tl.sqrt(tl.sum(after_TH, 1))
    cosine_T = tl.sum(dot_TH, 1) / tl.maximum(norms_T, 1e-12)
    tl.store(cosine_ptr + token_T, cosine_T, mask=inside_T)


def sequence_sums(x_BSU: Tensor, mask_BS: Tensor | None, hows) -> dict[str, Tensor]:
    """Sums over positions, for ``importance.finished``; nothing waits for the device.

    Args:
        x_BSU: activations.
        mask_BS: positions that count, or None.
        hows: aggregations.

    Returns:
        Of each, float32 of shape [samples, parts, units].
    """
    samples, positions, units = x_BSU.shape
    if x_BSU.stride(2) != 1:
        x_BSU = x_BSU.contiguous()
    columns = triton.cdiv(units, _BLOCK_U)
    wanted = 1 if "var" in hows else triton.cdiv(_PROGRAMS, samples * columns)
    blocks = triton.cdiv(positions, _BLOCK_S * wanted)
    parts = triton.cdiv(positions, _BLOCK_S * blocks)
    made = {how: x_BSU.new_empty((samples, parts, units), dtype=torch.float32) for how in hows}
    spare = made[hows[0]]
    masked = mask_BS is not None
    # a flag is a byte; the kernel wants positions side by side
    flag_BS = mask_BS.contiguous().view(torch.uint8) if masked else spare
    with torch.cuda.device_of(x_BSU):
        _sums[(samples, columns, parts)](
            x_BSU, flag_BS, *(made.get(how, spare) for how in ("mean", "l2", "var")),
            positions, units, blocks, parts, x_BSU.stride(0), x_BSU.stride(1), flag_BS.stride(0),
            MASKED=masked, MEAN="mean" in made, L2="l2" in made, VAR="var" in made,
            BLOCK_S=_BLOCK_S, BLOCK_U=_BLOCK_U,
        )  # fmt: skip
    return made


def cosines(before_BSH: Tensor, after_BSH: Tensor) -> Tensor:
    """As ``depth.cosines``, in one kernel."""
    before_TH, after_TH = (tensor.contiguous().flatten(0, 1) for tensor in (before_BSH, after_BSH))
    tokens, channels = before_TH.shape
    cosine_BS = before_BSH.new_empty(before_BSH.shape[:2], dtype=torch.float32)
    with torch.cuda.device_of(before_TH):
        _cosines[(triton.cdiv(tokens, _BLOCK_T),)](
            before_TH, after_TH, cosine_BS, tokens, channels, before_TH.stride(0), after_TH.stride(0),
            BLOCK_T=_BLOCK_T, BLOCK_H=_BLOCK_H,
        )  # fmt: skip
    return cosine_BS
