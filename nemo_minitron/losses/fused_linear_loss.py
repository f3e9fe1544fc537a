"""Distillation losses ([P1] section 3), with the output projection fused in.

Shape suffixes: T tokens, V vocabulary, H hidden of the student, G hidden of the teacher.

The logits of 4096 tokens at a vocabulary of 256000 take 4.2 GB in float32, for each model, and as much again
for their gradient. Because the loss is a scalar, its gradient with respect to the logits is known as soon as
the logits are: it is turned into the gradients of hidden states and head chunk by chunk **in the forward
pass**, so that one chunk of logits exists at a time and nothing is recomputed. Four matrix products a chunk,
as many as the naive way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.losses.loss_terms import LossWeights as LossWeights
from nemo_minitron.losses.loss_terms import chunk_terms
from nemo_minitron.losses.sparse_targets import SparseTargets
from nemo_minitron.losses.wide_matmul import add_products, scaled, sum_dtype, wide_dtype, wide_linear

CHUNK_BYTES, CPU_CHUNK_BYTES = 384 * 2**20, 96 * 2**20
"""Memory for one chunk of one model's logits in float32, on an accelerator and on the CPU; all that a chunk
needs is about three times as much. The larger it is, the less often the heads are read."""
LEAST_ROWS = 80
"""Tokens of a chunk that keep matrix products busy."""
CHUNKS = 10
"""With a small vocabulary the budget would hold every token, and nothing would be saved: so many chunks at
least. In bfloat16 the head's float32 gradient and two such chunks take less than a fifth of the naive way."""


def chunk_rows(tokens: int, entries: int, device: torch.device, buffers: int = 1) -> int:
    """Tokens of a chunk, where ``buffers`` of its size exist for each model's logits.

    As many as fit the budget, in ``CHUNKS`` chunks or more as long as each has ``LEAST_ROWS``.
    """
    size = CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES
    fitting = min(tokens, size // (4 * entries * buffers))
    return max(1, min(fitting, max(LEAST_ROWS, -(-tokens // CHUNKS))))


@dataclass(frozen=True)
class LossTerms:
    """Result of one evaluation.

    Attributes:
        loss: scalar to differentiate.
        divergence: mean divergence over valid tokens (nats, where it is one of distributions), detached; NaN
            without a teacher, or where it has no weight.
        ce: mean cross-entropy over valid tokens (nats), detached.
        more: further terms by name, detached.
    """

    loss: Tensor
    divergence: Tensor
    ce: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Terms by name, detached scalars; those that this training has."""
        known = {"loss": self.loss.detach(), "ce": self.ce, **self.more}
        return known if torch.isnan(self.divergence) else {**known, "divergence": self.divergence}


def fused_linear_loss(
    student_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    weights: LossWeights,
    teacher: tuple[Tensor, Tensor] | None = None,
    chunk_tokens: int | None = None,
    softcaps: tuple[float | None, float | None] = (None, None),
    vocabulary: int | None = None,
    targets: SparseTargets | None = None,
    compiled: bool = False,
) -> LossTerms:
    """Divergence and cross-entropy from hidden states, one chunk of logits at a time.

    Args:
        student_TH: the student's last hidden states, Tensor of shape [tokens, student hidden].
        head_VH: its output projection, Tensor of shape [vocabulary, student hidden].
        labels_T: next-token ids, Tensor of shape [tokens]; negative where a token does not count.
        weights: the mix.
        teacher: hidden states [tokens, teacher hidden] and head [vocabulary, teacher hidden], or None.
        chunk_tokens: tokens per chunk; None: as many as take ``CHUNK_BYTES``.
        softcaps: c of the student's and the teacher's logits x, where they are c tanh(x / c) (Gemma 2).
        vocabulary: entries of both heads that count, where they are padded to different sizes; None: all.
        targets: of each token what is known of the teacher, in its place.
        compiled: see ``chunk_terms``.

    Returns:
        The terms; ``loss`` carries gradients for ``student_TH`` and ``head_VH``.

    Raises:
        ValueError: the vocabularies differ, or a divergence is asked for without a teacher.
    """
    if teacher is None and targets is None and weights.kl != 0:
        raise ValueError("a divergence needs a teacher")
    head_VH, teacher = _counted(head_VH, teacher, vocabulary)
    valid_T = labels_T >= 0
    labels_T, student_TH = labels_T[valid_T], student_TH[valid_T]
    if teacher is not None:
        teacher = (teacher[0][valid_T].detach(), teacher[1].detach())
    targets = None if targets is None else targets[valid_T]
    student_TH, head_VH, teacher = _under_autocast(student_TH, head_VH, teacher)
    # what autograd keeps of the others
    buffers = 1 if weights.divergence.name == "forward_kl" and targets is None else 3
    chunk = chunk_tokens or chunk_rows(len(labels_T), head_VH.shape[0], head_VH.device, buffers)
    wants_gradient = torch.is_grad_enabled() and (student_TH.requires_grad or head_VH.requires_grad)
    with torch.autocast(student_TH.device.type, enabled=False):
        terms = _FusedLinearLoss.apply(
            student_TH, head_VH, labels_T, weights, teacher, chunk, softcaps, wants_gradient, targets,
            compiled,
        )  # fmt: skip
    return LossTerms(terms[0], terms[1].detach(), terms[2].detach())


def _under_autocast(
    student_TH: Tensor, head_VH: Tensor, teacher: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """In the low precision, where autocast is on: the products run in it, sums do not."""
    device = student_TH.device.type
    if not torch.is_autocast_enabled(device):
        return student_TH, head_VH, teacher
    low = torch.get_autocast_dtype(device)
    pair = None if teacher is None else (teacher[0].to(low), teacher[1].to(low))
    return student_TH.to(low), head_VH.to(low), pair


def _counted(
    head_VH: Tensor, teacher: tuple[Tensor, Tensor] | None, vocabulary: int | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Both heads without the entries that only pad them."""
    if vocabulary is not None:
        return head_VH[:vocabulary], None if teacher is None else (teacher[0], teacher[1][:vocabulary])
    if teacher is not None and teacher[1].shape[0] != head_VH.shape[0]:
        raise ValueError(f"vocabulary: teacher has {teacher[1].shape[0]} entries, student {head_VH.shape[0]}")
    return head_VH, teacher


class _FusedLinearLoss(torch.autograd.Function):
    """Computes the loss and, in the same sweep, both gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TH: Tensor,
        head_VH: Tensor,
        labels_T: Tensor,
        weights: LossWeights,
        teacher: tuple[Tensor, Tensor] | None,
        chunk: int,
        softcaps: tuple[float | None, float | None],
        wants_gradient: bool,
        targets: SparseTargets | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, divergence and cross-entropy, scalars; arguments as in ``fused_linear_loss``."""
        tokens = student_TH.shape[0]
        sums = torch.zeros(2, dtype=sum_dtype(student_TH.device), device=student_TH.device)
        wide = wide_dtype(student_TH.dtype)
        grad_TH = torch.zeros_like(student_TH, dtype=wide) if wants_gradient else None
        grad_VH = torch.zeros_like(head_VH, dtype=wide) if wants_gradient else None
        # both models' logits have their place for all chunks: new memory would cost more than the arithmetic
        shape = (min(chunk, tokens), head_VH.shape[0])
        places = [student_TH.new_empty(shape, dtype=wide) for _ in range(1 if teacher is None else 2)]
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            student_CH = student_TH[part]
            student_CV = _capped(wide_linear(student_CH, head_VH, places[0]), softcaps[0])
            teacher_CV: Tensor | SparseTargets | None = None if targets is None else targets[part]
            if teacher is not None:
                teacher_CV = _capped(wide_linear(teacher[0][part], teacher[1], places[1]), softcaps[1])
            slope_CV = None if softcaps[0] is None else 1 - (student_CV / softcaps[0]).square()
            kl, ce, grad_CV = chunk_terms(
                student_CV, teacher_CV, labels_T[part], weights, wants_gradient, compiled
            )
            sums += torch.stack([kl, ce])
            if grad_CV is not None and grad_TH is not None and grad_VH is not None:
                if slope_CV is not None:
                    grad_CV *= slope_CV
                add_products(grad_CV, student_CH, head_VH, grad_TH[part], grad_VH)
        means = (sums / max(tokens, 1)).to(wide)
        kl, ce = means[0], means[1]
        if wants_gradient:
            assert grad_VH is not None
            ctx.save_for_backward(grad_TH, grad_VH)
            ctx.tokens, ctx.dtypes = max(tokens, 1), (student_TH.dtype, head_VH.dtype)
        taught = teacher is not None or targets is not None
        loss = weights.kl * kl + weights.ce * ce if taught else weights.ce * ce
        if not taught or not weights.kl:  # then it was not computed
            kl = torch.full_like(kl, float("nan"))
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients [tokens, hidden] and [vocabulary, hidden], scaled by that of the loss."""
        grad_TH, grad_VH = ctx.saved_tensors
        # the mean is taken here, in float32 and together with the scale that float16 training puts on the
        # loss: divided by the number of tokens before, most of its gradients would round to zero
        scale = grad_loss.to(grad_TH.dtype) / ctx.tokens
        return (
            scaled(grad_TH, scale, ctx.dtypes[0]),
            scaled(grad_VH, scale, ctx.dtypes[1]),
            *(None for _ in range(8)),
        )


def _capped(logits_CV: Tensor, softcap: float | None) -> Tensor:
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)
