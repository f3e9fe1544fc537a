"""The fused loss where ranks share the vocabulary: each has some rows of both heads.

A rank makes the logits of its rows only. What is exchanged: per chunk of tokens the two normalisers and the
terms, and at the end the gradient of the hidden states.

Shape suffixes: T tokens, W vocabulary of this rank, H hidden of the student, G hidden of the teacher,
C tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.losses.fused_linear_loss import LossTerms, LossWeights, chunk_rows
from nemo_minitron.losses.wide_matmul import add_products, scaled, sum_dtype, wide_dtype, wide_linear

Reduce = Callable[[Tensor, str], Tensor]
"""Of a tensor and ``sum`` or ``max``: the same over all ranks that share the vocabulary, on each of them."""


def split_linear_loss(
    student_TH: Tensor,
    head_WH: Tensor,
    labels_T: Tensor,
    first: int,
    weights: LossWeights,
    reduce: Reduce,
    teacher: tuple[Tensor, Tensor] | None = None,
    softcaps: tuple[float | None, float | None] = (None, None),
    chunk_tokens: int | None = None,
) -> LossTerms:
    """Forward KL and cross-entropy as ``fused_linear_loss`` gives them, each rank with its rows of the heads.

    Args:
        student_TH: hidden states, Tensor of shape [tokens, hidden], the same on all ranks.
        head_WH: this rank's rows of the student's head.
        labels_T: next-token ids of the whole vocabulary; negative where a token does not count.
        first: the entry that this rank's first row stands for.
        weights: the mix; its divergence is forward KL.
        reduce: sums and maxima over the ranks.
        teacher: hidden states [tokens, teacher hidden] and this rank's rows of the teacher's head; None:
            cross-entropy only.
        softcaps: of the student's and the teacher's logits.
        chunk_tokens: tokens per chunk; None: as ``chunk_rows`` says.

    Returns:
        The terms, the same on all ranks; ``loss`` carries gradients for ``student_TH`` (whole) and
        ``head_WH``.

    Raises:
        ValueError: another divergence than forward KL.
    """
    if weights.divergence.name != "forward_kl":
        raise ValueError(f"a split vocabulary: expected forward_kl, found {weights.divergence.name}")
    valid_T = labels_T >= 0
    labels_T, student_TH = labels_T[valid_T] - first, student_TH[valid_T]
    if teacher is not None:
        teacher = (teacher[0][valid_T].detach(), teacher[1].detach())
    chunk = chunk_tokens or chunk_rows(len(labels_T), head_WH.shape[0], head_WH.device, 3)
    terms = _SplitLoss.apply(student_TH, head_WH, labels_T, weights, reduce, teacher, softcaps, chunk)
    return LossTerms(terms[0], terms[1].detach(), terms[2].detach())


class _SplitLoss(torch.autograd.Function):
    """Computes the loss and both gradients chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TH: Tensor,
        head_WH: Tensor,
        labels_T: Tensor,
        weights: LossWeights,
        reduce: Reduce,
        teacher: tuple[Tensor, Tensor] | None,
        softcaps: tuple[float | None, float | None],
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, divergence and cross-entropy, scalars; arguments as in ``split_linear_loss``."""
        sums = torch.zeros(2, dtype=sum_dtype(student_TH.device), device=student_TH.device)
        wide = wide_dtype(student_TH.dtype)
        grad_TH = torch.zeros_like(student_TH, dtype=wide)
        grad_WH = torch.zeros_like(head_WH, dtype=wide)
        for start in range(0, len(student_TH), chunk):
            part = slice(start, start + chunk)
            student_CW, slope_CW = _logits(student_TH[part], head_WH, softcaps[0])
            teacher_CW = None
            if teacher is not None and weights.kl != 0:
                teacher_CW, _ = _logits(teacher[0][part], teacher[1], softcaps[1])
            kl, ce, grad_CW = _chunk(student_CW, teacher_CW, labels_T[part], weights, reduce)
            sums += torch.stack([kl, ce])
            grad_CW = grad_CW if slope_CW is None else grad_CW * slope_CW
            add_products(grad_CW, student_TH[part], head_WH, grad_TH[part], grad_WH)
        tokens = max(len(student_TH), 1)
        kl, ce = (sums / tokens).to(wide)
        ctx.save_for_backward(reduce(grad_TH, "sum"), grad_WH)
        ctx.tokens, ctx.dtypes = tokens, (student_TH.dtype, head_WH.dtype)
        loss = weights.ce * ce if teacher is None else weights.kl * kl + weights.ce * ce
        if teacher is None or not weights.kl:
            kl = torch.full_like(kl, float("nan"))
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients [tokens, hidden], whole, and [rows of this rank, hidden]."""
        grad_TH, grad_WH = ctx.saved_tensors
        scale = grad_loss.to(grad_TH.dtype) / ctx.tokens
        return (
            scaled(grad_TH, scale, ctx.dtypes[0]),
            scaled(grad_WH, scale, ctx.dtypes[1]),
            *(None for _ in range(6)),
        )


def _logits(hidden_CH: Tensor, head_WH: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """This rank's logits, and the slope of the cap where there is one."""
    logits_CW = wide_linear(hidden_CH, head_WH)
    if cap is None:
        return logits_CW, None
    capped_CW = cap * torch.tanh(logits_CW / cap)
    return capped_CW, 1 - (capped_CW / cap).square()


def _log_softmax(logits_CW: Tensor, reduce: Reduce) -> Tensor:
    """Logarithms of the softmax over all ranks' entries."""
    top_C = reduce(logits_CW.amax(-1), "max")
    shifted_CW = logits_CW - top_C[:, None]
    return shifted_CW - reduce(shifted_CW.exp().sum(-1), "sum").log()[:, None]


def _chunk(
    student_CW: Tensor, teacher_CW: Tensor | None, labels_C: Tensor, weights: LossWeights, reduce: Reduce
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of both terms over a chunk, and the gradient of their mix by this rank's logits."""
    tau = weights.divergence.temperature
    log_q1_CW = _log_softmax(student_CW, reduce)
    rows = student_CW.shape[1]
    mine_C = (labels_C >= 0) & (labels_C < rows)
    picked_C = log_q1_CW.gather(1, labels_C.clamp(0, rows - 1)[:, None])[:, 0] * mine_C
    grad_CW = log_q1_CW.exp()
    grad_CW[mine_C.nonzero()[:, 0], labels_C[mine_C]] -= 1
    grad_CW *= weights.ce
    kl = torch.zeros((), dtype=sum_dtype(student_CW.device), device=student_CW.device)
    if teacher_CW is not None:
        log_p_CW = _log_softmax(teacher_CW / tau, reduce)
        log_q_CW = log_q1_CW if tau == 1 else _log_softmax(student_CW / tau, reduce)
        p_CW = log_p_CW.exp()
        kl = (p_CW * (log_p_CW - log_q_CW)).sum(-1).to(kl.dtype).sum() * tau**2
        grad_CW += (log_q_CW.exp() - p_CW) * (weights.kl * tau)
    sums = reduce(torch.stack([kl, -picked_C.to(kl.dtype).sum()]), "sum")
    return sums[0], sums[1], grad_CW
