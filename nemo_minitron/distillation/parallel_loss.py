"""The fused loss on one rank: alone, or together with the ranks that share its samples."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nemo_minitron.losses.fused_linear_loss import LossTerms, LossWeights, fused_linear_loss
from nemo_minitron.losses.vocabulary_parallel import split_linear_loss

_HOW = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def linear_loss(
    mesh: DeviceMesh | None,
    student_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    weights: LossWeights,
    teacher: tuple[Tensor, Tensor] | None = None,
    chunk_tokens: int | None = None,
    softcaps: tuple[float | None, float | None] = (None, None),
    vocabulary: int | None = None,
    compiled: bool = False,
) -> LossTerms:
    """``fused_linear_loss``, the vocabulary split over tensor-parallel ranks where there are several.

    They read the same tokens; without the split each would compute the same loss. Other divergences than
    forward KL do not split, and are computed by each.
    """
    group = None if mesh is None else mesh["tensor_parallel"]
    if group is None or group.size() == 1 or weights.divergence.name != "forward_kl":
        return fused_linear_loss(
            student_TH, head_VH, labels_T, weights, teacher, chunk_tokens, softcaps, vocabulary,
            compiled=compiled,
        )  # fmt: skip
    if vocabulary is not None:
        head_VH = head_VH[:vocabulary]
        teacher = None if teacher is None else (teacher[0], teacher[1][:vocabulary])
    entries, parts, rank = head_VH.shape[0], group.size(), group.get_local_rank()
    first, last = entries * rank // parts, entries * (rank + 1) // parts

    def reduce(tensor: Tensor, how: str) -> Tensor:
        whole = tensor.detach().clone()
        dist.all_reduce(whole, _HOW[how], group=group.get_group())
        return whole

    device = student_TH.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    head_WH = _Rows.apply(head_VH, first, last, reduce)
    pair = None if teacher is None else (teacher[0], teacher[1][first:last])
    if low is not None:  # the products run in the low precision, sums do not
        student_TH, head_WH = student_TH.to(low), head_WH.to(low)
        pair = None if pair is None else (pair[0].to(low), pair[1].to(low))
    with torch.autocast(device, enabled=False):
        return split_linear_loss(
            student_TH, head_WH, labels_T, first, weights, reduce, pair, softcaps, chunk_tokens
        )


class _Rows(torch.autograd.Function):
    """Some rows of a head that every rank holds whole; their gradients are gathered on all ranks."""

    @staticmethod
    def forward(ctx: Any, head_VH: Tensor, first: int, last: int, reduce: Any) -> Tensor:
        """Rows ``first`` to ``last``, [rows, hidden]."""
        ctx.shape, ctx.rows, ctx.reduce = head_VH.shape, slice(first, last), reduce
        return head_VH[first:last].clone()

    @staticmethod
    def backward(ctx: Any, grad_WH: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the whole head."""
        grad_VH = grad_WH.new_zeros(ctx.shape)
        grad_VH[ctx.rows] = grad_WH
        return ctx.reduce(grad_VH, "sum"), None, None, None
