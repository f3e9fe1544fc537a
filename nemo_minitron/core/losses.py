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

from nemo_minitron.core.divergences import Divergence
from nemo_minitron.core.sparse import SparseTargets, sparse_divergence

CHUNK_BYTES = 64 * 2**20
"""Memory for one chunk of logits in float32; a chunk is processed in about three buffers of this size."""


@dataclass(frozen=True)
class LossWeights:
    """L = kl x divergence(teacher, student) + ce x cross-entropy, means over valid tokens."""

    kl: float = 1.0
    ce: float = 0.0
    divergence: Divergence = Divergence()


@dataclass(frozen=True)
class LossTerms:
    """Result of one evaluation.

    Attributes:
        loss: scalar to differentiate.
        divergence: mean divergence over valid tokens (nats, where it is one of distributions), detached; NaN
            without a teacher.
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
) -> LossTerms:
    """Divergence and cross-entropy from hidden states, one chunk of logits at a time.

    Args:
        student_TH: the student's last hidden states, Tensor of shape [tokens, student hidden].
        head_VH: its output projection, Tensor of shape [vocabulary, student hidden].
        labels_T: next-token ids, Tensor of shape [tokens]; negative where a token does not count.
        weights: the mix.
        teacher: hidden states [tokens, teacher hidden] and head [vocabulary, teacher hidden]; None:
            cross-entropy only.
        chunk_tokens: tokens per chunk; None chooses from the vocabulary so that a chunk takes
            ``CHUNK_BYTES``.
        softcaps: caps c of the student's and the teacher's logits x, which then are c tanh(x / c) (Gemma 2);
            None: as the projection gives them.
        vocabulary: entries of both heads that count, where they are padded to different sizes; None: all.
        targets: of each token what is known of the teacher, in its place.

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
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * head_VH.shape[0] * buffers))
    wants_gradient = torch.is_grad_enabled() and (student_TH.requires_grad or head_VH.requires_grad)
    with torch.autocast(student_TH.device.type, enabled=False):
        terms = _FusedLinearLoss.apply(
            student_TH, head_VH, labels_T, weights, teacher, chunk, softcaps, wants_gradient, targets
        )
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, divergence and cross-entropy, scalars; arguments as in ``fused_linear_loss``."""
        tokens = student_TH.shape[0]
        sums = torch.zeros(2, dtype=torch.float64, device=student_TH.device)
        grad_TH = torch.empty_like(student_TH) if wants_gradient else None
        grad_VH = torch.zeros_like(head_VH, dtype=torch.float32) if wants_gradient else None
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            student_CH = student_TH[part]
            student_CV = _capped((student_CH @ head_VH.T).float(), softcaps[0])
            teacher_CV: Tensor | SparseTargets | None = None if targets is None else targets[part]
            if teacher is not None:
                teacher_CV = _capped((teacher[0][part] @ teacher[1].T).float(), softcaps[1])
            slope_CV = None if softcaps[0] is None else 1 - (student_CV / softcaps[0]).square()
            kl, ce, grad_CV = _chunk_terms(student_CV, teacher_CV, labels_T[part], weights, wants_gradient)
            sums += torch.stack([kl, ce])
            if grad_CV is not None and grad_TH is not None and grad_VH is not None:
                if slope_CV is not None:
                    grad_CV *= slope_CV
                grad_CV = grad_CV.to(head_VH.dtype)
                torch.mm(grad_CV, head_VH, out=grad_TH[part])
                _accumulate(grad_VH, grad_CV, student_CH)
        means = (sums / max(tokens, 1)).float()
        kl, ce = means[0], means[1]
        if wants_gradient:
            assert grad_VH is not None
            ctx.save_for_backward(grad_TH, grad_VH)
            ctx.tokens, ctx.head_dtype = max(tokens, 1), head_VH.dtype
        taught = teacher is not None or targets is not None
        loss = weights.kl * kl + weights.ce * ce if taught else weights.ce * ce
        if not taught:
            kl = torch.full_like(kl, float("nan"))
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients [tokens, hidden] and [vocabulary, hidden], scaled by that of the loss."""
        grad_TH, grad_VH = ctx.saved_tensors
        # the mean is taken here, in float32 and together with the scale that float16 training puts on the
        # loss: divided by the number of tokens before, most of its gradients would round to zero
        scale = grad_loss.float() / ctx.tokens
        return (
            (grad_TH * scale).to(grad_TH.dtype),
            (grad_VH * scale).to(ctx.head_dtype),
            *(None for _ in range(7)),
        )


def _capped(logits_CV: Tensor, softcap: float | None) -> Tensor:
    return logits_CV if softcap is None else softcap * torch.tanh(logits_CV / softcap)


def _accumulate(grad_VH: Tensor, grad_CV: Tensor, student_CH: Tensor) -> None:
    """Adds one chunk's gradient of the head.

    The sum over chunks stays in float32 whatever the model's dtype.
    """
    if grad_CV.dtype == torch.float32:
        grad_VH.addmm_(grad_CV.T, student_CH)
    else:
        grad_VH += grad_CV.T @ student_CH


def _chunk_terms(
    student_CV: Tensor,
    teacher_CV: Tensor | SparseTargets | None,
    labels_C: Tensor,
    weights: LossWeights,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of both terms over one chunk, and the gradient of their mix by the student's logits."""
    by_hand = isinstance(teacher_CV, Tensor) and weights.divergence.name == "forward_kl"
    if teacher_CV is not None and weights.kl != 0 and not by_hand:
        value, grad_CV = _differentiated(student_CV, teacher_CV, weights, wants_gradient)
        _, ce, more_CV = _chunk_terms(student_CV, None, labels_C, weights, wants_gradient and weights.ce != 0)
        return value, ce, grad_CV if grad_CV is None or more_CV is None else grad_CV.add_(more_CV)
    tau = weights.divergence.temperature
    log_q1_CV = torch.log_softmax(student_CV, -1)
    picked_C = log_q1_CV.gather(1, labels_C[:, None])[:, 0]
    ce = -picked_C.double().sum()
    grad_CV = None
    if not isinstance(teacher_CV, Tensor) or weights.kl == 0:
        kl = torch.zeros_like(ce)
        if wants_gradient:
            grad_CV = _cross_entropy_gradient(log_q1_CV.exp_(), labels_C, weights.ce)
        return kl, ce, grad_CV
    # forward KL, the default, by hand: its gradient is tau (q - p), and two buffers suffice
    log_q_CV = log_q1_CV if tau == 1 else torch.log_softmax(student_CV / tau, -1)
    log_p_CV = torch.log_softmax(teacher_CV if tau == 1 else teacher_CV / tau, -1)
    p_CV = log_p_CV.exp()
    kl = log_p_CV.sub_(log_q_CV).mul_(p_CV).sum(-1).double().sum() * tau**2
    if wants_gradient:
        if weights.ce == 0:
            return kl, ce, log_q_CV.exp_().sub_(p_CV).mul_(weights.kl * tau)
        q1_CV = log_q1_CV.exp()
        q_CV = q1_CV if tau == 1 else log_q_CV.exp_()
        grad_CV = (q_CV - p_CV).mul_(weights.kl * tau)
        grad_CV += _cross_entropy_gradient(q1_CV, labels_C, weights.ce)
    return kl, ce, grad_CV


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
            return value.detach().double(), None
        (grad_CV,) = torch.autograd.grad(value, leaf_CV)
    return value.detach().double(), grad_CV.mul_(weights.kl)


def _cross_entropy_gradient(q_CV: Tensor, labels_C: Tensor, weight: float) -> Tensor:
    """Turns probabilities into the gradient of weighted cross-entropy, in place: weight x (q - one_hot)."""
    q_CV[torch.arange(q_CV.shape[0], device=q_CV.device), labels_C] -= 1.0
    return q_CV.mul_(weight)
