"""Distillation losses ([P1] section 3), with the output projection fused in.

The logits of 4096 tokens at a vocabulary of 256000 take 4.2 GB in float32, for each model, and as
much again for their gradient. Because the loss is a scalar, its gradient with respect to the logits
is known as soon as the logits are: it is turned into the gradients of hidden states and head chunk
by chunk **in the forward pass**, so that one chunk of logits exists at a time and nothing is
recomputed. Four matrix products a chunk, as many as the naive way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.losses.loss_terms import CROSS_ENTROPY, ByAutograd, ByHand, Term
from nemo_minitron.losses.loss_terms import LossWeights as LossWeights
from nemo_minitron.losses.projection import Projection, softcap_slope
from nemo_minitron.losses.sparse_targets import SparseTargets
from nemo_minitron.losses.vocabulary_parallel import Sharded, VocabularyShard
from nemo_minitron.losses.wide_matmul import add_products, scaled, sum_dtype, wide_dtype

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
class LossResult:
    """Result of one evaluation.

    Attributes:
        loss: scalar to differentiate.
        divergence: mean divergence over valid tokens (nats, where it is one of distributions),
            detached; NaN without a teacher, or where it has no weight.
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


def cross_entropy(
    model: Projection,
    labels_T: Tensor,
    *,
    shard: VocabularyShard | None = None,
    compiled: bool = False,
) -> LossResult:
    """A model's cross-entropy with the labels, in nats; arguments as in ``fused_linear_loss``."""
    return fused_linear_loss(model, labels_T, CROSS_ENTROPY, shard=shard, compiled=compiled)


def fused_linear_loss(
    student: Projection,
    labels_T: Tensor,
    weights: LossWeights,
    teacher: Projection | SparseTargets | None = None,
    *,
    chunk_tokens: int | None = None,
    vocabulary: int | None = None,
    shard: VocabularyShard | None = None,
    compiled: bool = False,
) -> LossResult:
    """Divergence and cross-entropy from hidden states, one chunk of logits at a time.

    Args:
        student: the student's last hidden states, [tokens, student hidden], and its head.
        labels_T: next-token ids, Tensor of shape [tokens]; negative where a token does not count.
        weights: the mix.
        teacher: the teacher's, [tokens, teacher hidden]; or of each token what is known of it; or
            None.
        chunk_tokens: tokens per chunk; None: as ``chunk_rows`` says.
        vocabulary: entries of both heads that count, where they are padded to different sizes;
            None: all.
        shard: where ranks share the vocabulary, what this rank's rows of both heads stand for: the
            hidden states, the labels and the terms are the same on all ranks. None: the heads are
            whole.
        compiled: see ``loss_terms.ByHand``; a shard's term is never compiled.

    Returns:
        The terms; ``loss`` carries gradients for the student's hidden states and head.

    Raises:
        ValueError: the vocabularies differ, a divergence is asked for without a teacher, or one
            that a split vocabulary does not have.
    """
    if teacher is None and weights.kl != 0:
        raise ValueError("a divergence needs a teacher")
    term = _term(weights, teacher, shard, compiled)
    student = student.counted(vocabulary).as_autocast()
    entries, device = student.head_VH.shape[0], student.head_VH.device
    if isinstance(teacher, Projection):
        teacher = teacher.counted(vocabulary).detached().as_autocast()
        if teacher.head_VH.shape[0] != entries:
            raise ValueError(
                f"vocabulary: teacher has {teacher.head_VH.shape[0]} entries, student {entries}"
            )
    valid_T = labels_T >= 0
    labels_T, student = labels_T[valid_T], student[valid_T]
    teacher = None if teacher is None or weights.kl == 0 else teacher[valid_T]
    most = entries if shard is None else shard.largest or entries
    chunk = chunk_tokens or chunk_rows(len(labels_T), most, device, term.buffers)
    wants = torch.is_grad_enabled() and (
        student.hidden_TH.requires_grad or student.head_VH.requires_grad
    )
    inputs = _LossInputs(labels_T, weights, teacher, student.softcap, term, chunk, wants, shard)
    with torch.autocast(device.type, enabled=False):
        loss, divergence, ce = _FusedLinearLoss.apply(student.hidden_TH, student.head_VH, inputs)
    return LossResult(loss, divergence.detach(), ce.detach())


def _term(
    weights: LossWeights,
    teacher: Projection | SparseTargets | None,
    shard: VocabularyShard | None,
    compiled: bool,
) -> Term:
    """What evaluates a chunk."""
    if shard is not None:
        return Sharded(weights, shard)
    if weights.divergence.name == "forward_kl" and not isinstance(teacher, SparseTargets):
        return ByHand(weights, compiled)
    return ByAutograd(weights, compiled)


@dataclass(frozen=True)
class _LossInputs:
    """What the chunk loop works with, besides the two tensors that get gradients.

    Attributes:
        labels_T: ids of the valid tokens, to which everything else is reduced too.
        weights: the mix.
        teacher: None where the loss needs none.
        softcap: the student's.
        term: evaluates a chunk.
        chunk: tokens of one.
        wants_gradient: whether gradients are made.
        shard: see ``fused_linear_loss``.
    """

    labels_T: Tensor
    weights: LossWeights
    teacher: Projection | SparseTargets | None
    softcap: float | None
    term: Term
    chunk: int
    wants_gradient: bool
    shard: VocabularyShard | None


class _FusedLinearLoss(torch.autograd.Function):
    """Computes the loss and, in the same sweep, both gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, student_TH: Tensor, head_VH: Tensor, inputs: _LossInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, divergence and cross-entropy, scalars."""
        student, wide = (
            Projection(student_TH, head_VH, inputs.softcap),
            wide_dtype(student_TH.dtype),
        )
        tokens, total = len(student_TH), student_TH.new_zeros(2, dtype=sum_dtype(student_TH.device))
        grad_TH = torch.zeros_like(student_TH, dtype=wide) if inputs.wants_gradient else None
        grad_VH = torch.zeros_like(head_VH, dtype=wide) if inputs.wants_gradient else None
        # both models' logits have their place for all chunks: new memory would cost more than the
        # arithmetic
        shape = (min(inputs.chunk, tokens), head_VH.shape[0])
        student_place = student_TH.new_empty(shape, dtype=wide)
        teacher_place = (
            torch.empty_like(student_place) if isinstance(inputs.teacher, Projection) else None
        )
        for start in range(0, tokens, inputs.chunk):
            part = slice(start, start + inputs.chunk)
            student_CV = student[part].logits(student_place)
            taught_C = None if inputs.teacher is None else inputs.teacher[part]
            teacher_CV = (
                taught_C.logits(teacher_place) if isinstance(taught_C, Projection) else taught_C
            )
            # before the term overwrites the logits
            slope_CV = (
                None if student.softcap is None else softcap_slope(student_CV, student.softcap)
            )
            sums, grad_CV = inputs.term(
                student_CV, teacher_CV, inputs.labels_T[part], inputs.wants_gradient
            )
            total += sums
            if grad_CV is not None and grad_TH is not None:
                grad_CV = grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)
                add_products(grad_CV, student_TH[part], head_VH, grad_TH[part], grad_VH)
        kl, ce = (total / max(tokens, 1)).to(wide)
        if grad_TH is not None and grad_VH is not None:
            whole_TH = grad_TH if inputs.shard is None else inputs.shard.reduce(grad_TH, "sum")
            ctx.save_for_backward(whole_TH, grad_VH)
            ctx.tokens, ctx.dtypes = max(tokens, 1), (student_TH.dtype, head_VH.dtype)
        if inputs.teacher is None:
            loss, kl = inputs.weights.ce * ce, torch.full_like(kl, float("nan"))
        else:
            loss = inputs.weights.kl * kl + inputs.weights.ce * ce
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients [tokens, hidden] and [vocabulary, hidden], scaled by that of the loss."""
        grad_TH, grad_VH = ctx.saved_tensors
        # the mean is taken here, in float32 and together with the scale that float16 training puts
        # on the loss: divided by the number of tokens before, most of its gradients would round to
        # zero
        scale = grad_loss.to(grad_TH.dtype) / ctx.tokens
        return scaled(grad_TH, scale, ctx.dtypes[0]), scaled(grad_VH, scale, ctx.dtypes[1]), None
