"""Divergence and cross-entropy of one chunk of logits, and their gradient by the student's.

Shape suffixes: C tokens of a chunk, B tokens of a block of it, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.sparse_targets import SparseTargets, sparse_divergence
from nemo_minitron.losses.wide_matmul import sum_dtype

BLOCK_BYTES, CPU_BLOCK_BYTES = 64 * 2**20, 2**20
"""A chunk is passed over in blocks of rows; the CPU's stay in its cache."""


@dataclass(frozen=True)
class LossWeights:
    """L = kl x divergence(teacher, student) + ce x cross-entropy, means over valid tokens."""

    kl: float = 1.0
    ce: float = 0.0
    divergence: Divergence = Divergence()


def chunk_terms(
    student_CV: Tensor,
    teacher_CV: Tensor | SparseTargets | None,
    labels_C: Tensor,
    weights: LossWeights,
    wants_gradient: bool,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of both terms over one chunk, and the gradient of their mix by the student's logits.

    The logits are overwritten. With ``compiled``, torch.compile makes kernels of forward KL and cross-entropy
    (Triton on a GPU): the same numbers but for rounding.
    """
    by_hand = isinstance(teacher_CV, Tensor) and weights.divergence.name == "forward_kl"
    if teacher_CV is not None and weights.kl != 0 and not by_hand:
        value, grad_CV = _differentiated(student_CV, teacher_CV, weights, wants_gradient)
        wants_more = wants_gradient and weights.ce != 0
        _, ce, more_CV = chunk_terms(student_CV, None, labels_C, weights, wants_more, compiled)
        return value, ce, grad_CV if grad_CV is None or more_CV is None else grad_CV.add_(more_CV)
    teacher_CV = teacher_CV if isinstance(teacher_CV, Tensor) and weights.kl != 0 else None
    if compiled:  # passes over the chunk without a temporary: no need of blocks
        sums = _compiled_terms()(student_CV, teacher_CV, labels_C, weights, wants_gradient)
        return sums[0], sums[1], student_CV if wants_gradient else None
    rows, entries = student_CV.shape
    room = CPU_BLOCK_BYTES if student_CV.device.type == "cpu" else BLOCK_BYTES
    size = max(1, room // (student_CV.element_size() * entries))
    sums = torch.zeros(2, dtype=sum_dtype(student_CV.device), device=student_CV.device)
    for block in (slice(start, start + size) for start in range(0, rows, size)):
        teacher_BV = None if teacher_CV is None else teacher_CV[block]
        sums += _block_terms_(student_CV[block], teacher_BV, labels_C[block], weights, wants_gradient)
    return sums[0], sums[1], student_CV if wants_gradient else None


def _block_terms_(
    student_BV: Tensor,
    teacher_BV: Tensor | None,
    labels_B: Tensor,
    weights: LossWeights,
    wants_gradient: bool,
) -> Tensor:
    """Sums of forward KL and cross-entropy, Tensor of shape [2]; the student's logits become the gradient.

    With x and y the logits over the temperature t, less their maxima, p = e^y / P and q = e^x / Q:
    KL = sum p (y - x) - log P + log Q, and the gradient of t^2 KL by the student's logits is t (q - p).
    """
    tau, column, wide = weights.divergence.temperature, labels_B[:, None], sum_dtype(student_BV.device)
    student_BV -= student_BV.amax(-1, keepdim=True)
    picked_B1 = student_BV.gather(1, column)
    if teacher_BV is None:
        total_B1 = student_BV.exp_().sum(-1, keepdim=True)
        ce = (total_B1.log() - picked_B1).to(wide).sum()
        if wants_gradient:
            student_BV *= weights.ce / total_B1
            student_BV.scatter_add_(1, column, picked_B1.new_full(column.shape, -weights.ce))
        return torch.stack([torch.zeros_like(ce), ce])
    teacher_BV -= teacher_BV.amax(-1, keepdim=True)
    own_BV, own_B1 = None, None  # the student's at temperature 1, if that is another
    if tau != 1:
        own_BV = student_BV.exp()
        own_B1 = own_BV.sum(-1, keepdim=True)
        student_BV /= tau
        teacher_BV /= tau
    gap_BV = teacher_BV - student_BV
    total_p_B1 = teacher_BV.exp_().sum(-1, keepdim=True)
    total_q_B1 = student_BV.exp_().sum(-1, keepdim=True)
    mean_gap_B1 = gap_BV.mul_(teacher_BV).sum(-1, keepdim=True) / total_p_B1
    kl = (mean_gap_B1 - total_p_B1.log() + total_q_B1.log()).to(wide).sum() * tau**2
    ce = ((total_q_B1 if own_B1 is None else own_B1).log() - picked_B1).to(wide).sum()
    if wants_gradient:
        by_q = weights.kl * tau + (weights.ce if own_B1 is None else 0.0)
        student_BV *= by_q / total_q_B1
        student_BV.addcmul_(teacher_BV, weights.kl * tau / total_p_B1, value=-1)
        if weights.ce != 0:
            if own_BV is not None and own_B1 is not None:
                student_BV.addcmul_(own_BV, weights.ce / own_B1)
            student_BV.scatter_add_(1, column, picked_B1.new_full(column.shape, -weights.ce))
    return torch.stack([kl, ce])


@functools.cache
def _compiled_terms() -> Callable[..., Tensor]:
    return torch.compile(_block_terms_)


def _differentiated(
    student_CV: Tensor, teacher_CV: Tensor | SparseTargets, weights: LossWeights, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of any divergence over one chunk and its gradient by the student's logits, by autograd."""
    with torch.enable_grad():
        leaf_CV = student_CV.detach().requires_grad_(wants_gradient)
        if isinstance(teacher_CV, Tensor):
            value = weights.divergence(teacher_CV, leaf_CV).sum()
        else:
            value = sparse_divergence(teacher_CV, leaf_CV, weights.divergence.temperature).sum()
        if not wants_gradient:
            return value.detach().to(sum_dtype(student_CV.device)), None
        (grad_CV,) = torch.autograd.grad(value, leaf_CV)
    return value.detach().to(sum_dtype(student_CV.device)), grad_CV.mul_(weights.kl)
