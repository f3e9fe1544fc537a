"""The fused loss on one rank: alone, or together with the ranks that share its samples."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nemo_minitron.losses.fused_linear_loss import LossResult, LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.vocabulary_parallel import Reduce, VocabularyShard

_HOW = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def linear_loss(
    mesh: DeviceMesh | None,
    student: Projection,
    labels_T: Tensor,
    weights: LossWeights,
    teacher: Projection,
    *,
    chunk_tokens: int | None = None,
    vocabulary: int | None = None,
    compiled: bool = False,
) -> LossResult:
    """``fused_linear_loss``, the vocabulary split over tensor-parallel ranks where there are several.

    They read the same tokens; without the split each would compute the same loss. Other divergences
    than forward KL, and tokens that count by their mass, do not split, and are computed by each.

    Args:
        mesh: with a dimension ``tensor_parallel``; None: one rank.
        student: its hidden states, the same on all of these ranks, and its whole head.
        labels_T: see ``fused_linear_loss``, as for all further arguments.
        weights: see there.
        teacher: as the student.
        chunk_tokens: see there.
        vocabulary: see there.
        compiled: see there.

    Returns:
        The terms, the same on all of these ranks; gradients come to the whole head on each of them.
    """
    student, teacher, shard = student.counted(vocabulary), teacher.counted(vocabulary), None
    if weights.divergence.name == "forward_kl" and teacher.mass_T is None:
        shard, student, teacher = sharded(mesh, student, teacher)
    return fused_linear_loss(
        student,
        labels_T,
        weights,
        teacher,
        chunk_tokens=chunk_tokens,
        shard=shard,
        compiled=compiled,
    )


def sharded(
    mesh: DeviceMesh | None, student: Projection, teacher: Projection | None = None
) -> tuple[VocabularyShard | None, Projection, Projection | None]:
    """A rank's part of a loss: its rows of the heads; where it is alone, no shard, and all as it came.

    Arguments as in ``linear_loss``.
    """
    group = None if mesh is None else mesh["tensor_parallel"]
    if group is None or group.size() == 1:
        return None, student, teacher
    entries, ranks, rank = student.head_VH.shape[0], group.size(), group.get_local_rank()
    rows = slice(entries * rank // ranks, entries * (rank + 1) // ranks)

    def reduce(tensor: Tensor, how: str) -> Tensor:
        whole = tensor.detach().clone()
        dist.all_reduce(whole, _HOW[how], group=group.get_group())
        return whole

    student = replace(student, head_VH=_Rows.apply(student.head_VH, rows, reduce))
    if teacher is not None:
        teacher = replace(teacher, head_VH=teacher.head_VH[rows])
    return VocabularyShard(rows.start, reduce, -(-entries // ranks)), student, teacher


class _Rows(torch.autograd.Function):
    """Some rows of a head that every rank holds whole; their gradients are gathered on all ranks."""

    @staticmethod
    def forward(ctx: Any, head_VH: Tensor, rows: slice, reduce: Reduce) -> Tensor:
        """The rows, Tensor of shape [rows, hidden]."""
        ctx.shape, ctx.rows, ctx.reduce = head_VH.shape, rows, reduce
        return head_VH[rows].clone()

    @staticmethod
    def backward(ctx: Any, grad_WH: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the whole head, Tensor of shape [vocabulary, hidden]."""
        grad_VH = grad_WH.new_zeros(ctx.shape)
        grad_VH[ctx.rows] = grad_WH
        return ctx.reduce(grad_VH, "sum"), None, None
