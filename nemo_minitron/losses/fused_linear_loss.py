"""Distillation losses ([P1] section 3), with the output projection fused in.

The logits of 4096 tokens at a vocabulary of 256000 take 4.2 GB in float32, for each model, and as
much again for their gradient. Because the loss is a scalar, its gradient with respect to the logits
is known as soon as the logits are: it is turned into the gradients of hidden states and head chunk
by chunk **in the forward pass**, so that one chunk of logits exists at a time and nothing is
recomputed. Four matrix products a chunk, as many as the naive way. On CUDA a Triton kernel makes sums
and gradients (``kernels.py``), and the products that give the gradients take several chunks at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.losses.loss_terms import (
    CROSS_ENTROPY,
    ByHand,
    ByKernel,
    Term,
    kernels_for,
)
from nemo_minitron.losses.loss_terms import LossWeights as LossWeights
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.sparse_targets import SparseTargets
from nemo_minitron.losses.vocabulary_parallel import Sharded, VocabularyShard
from nemo_minitron.losses.wide_matmul import (
    add_products,
    scaled,
    sum_dtype,
    wide_dtype,
    writes_fresh,
)

CHUNK_BYTES, CPU_CHUNK_BYTES = 384 * 2**20, 96 * 2**20
"""Memory for one chunk of one model's logits in float32, on accelerators but CUDA's, and on the CPU; all that
a chunk needs is about three times as much. The larger it is, the less often the heads are read."""
CUDA_BYTES = 512 * 2**20
"""Memory for logits and their gradients on CUDA, beside what the head's gradient takes when it is finished:
that is not there yet while the logits are."""
FEW_CHUNKS, LARGE_BYTES = 16, 2 * 2**30
"""More chunks than these only where they would take more than so much memory: with a small vocabulary each is
short work, and the host must not spend longer on starting it."""
GROUP = 4
"""Chunks whose gradients are multiplied together on CUDA: the head's is read and written once for them.
Their gradients by the logits are in the products' precision, a fourth of what both models' logits take."""
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


def cuda_rows(tokens: int, head_VH: Tensor, models: int, buffers: int) -> tuple[int, int]:
    """Tokens of a chunk, and of a group of chunks, on CUDA.

    Args:
        tokens: of all chunks.
        head_VH: the student's head.
        models: whose logits exist.
        buffers: tensors of the logits' size for each model.
    """
    entries, size = head_VH.shape[0], head_VH.element_size()
    budget = CUDA_BYTES + size * head_VH.numel()
    each = entries * (4 * models * buffers + size * GROUP)
    most = max(1, budget // each, min(-(-tokens // FEW_CHUNKS), LARGE_BYTES // each))
    groups = -(-tokens // (GROUP * most))
    chunk = -(-tokens // (GROUP * max(1, groups)))
    chunk = -(-chunk // 128) * 128 if most >= 128 else chunk  # whole tiles of the matrix products
    return max(1, min(chunk, tokens)), max(1, min(GROUP * chunk, tokens))


def most_cuda_bytes(entries: int, hidden: int) -> int:
    """The most that logits and their gradients take at a time on CUDA, with a head in 16 bits."""
    return max(LARGE_BYTES, CUDA_BYTES + 2 * entries * hidden)


@dataclass(frozen=True)
class LossResult:
    """Result of one evaluation.

    Attributes:
        loss: scalar to differentiate.
        divergence: mean divergence over valid tokens (nats, where it is one of distributions),
            detached; NaN without a teacher, or where it has no weight.
        ce: mean cross-entropy over valid tokens (nats), detached.
        more: further terms by name, detached.
        taught: whether there is a divergence.
    """

    loss: Tensor
    divergence: Tensor
    ce: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)
    taught: bool = True

    def named(self) -> dict[str, Tensor]:
        """Terms by name, detached scalars; those that this training has."""
        known = {"loss": self.loss.detach(), "ce": self.ce, **self.more}
        # not asked of the number: the host would wait for the device
        return {**known, "divergence": self.divergence} if self.taught else known


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
        chunk_tokens: tokens per chunk; None: as ``chunk_rows`` and ``cuda_rows`` say.
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
    student = student.counted(vocabulary).as_autocast()
    term = _term(weights, teacher, shard, compiled, student.head_VH)
    if isinstance(teacher, Projection):
        teacher = _comparable(teacher.counted(vocabulary), student)
    teacher = None if weights.kl == 0 else teacher
    valid_T = labels_T >= 0
    count: int | Tensor = valid_T.sum()  # stays where it is: the host need not know it
    if not term.skips:
        labels_T, student = labels_T[valid_T], student[valid_T]
        teacher, count = None if teacher is None else teacher[valid_T], len(labels_T)
    rows = _rows(len(labels_T), student.head_VH, teacher, term, shard, chunk_tokens)
    wants = torch.is_grad_enabled() and (
        student.hidden_TH.requires_grad or student.head_VH.requires_grad
    )
    inputs = _LossInputs(
        labels_T, count, weights, teacher, student.softcap, term, rows, wants, shard
    )
    with torch.autocast(student.head_VH.device.type, enabled=False):
        loss, divergence, ce = _FusedLinearLoss.apply(student.hidden_TH, student.head_VH, inputs)
    return LossResult(loss, divergence.detach(), ce.detach(), taught=teacher is not None)


def _comparable(teacher: Projection, student: Projection) -> Projection:
    """The teacher without gradients, if it has as many entries as the student."""
    found, expected = teacher.head_VH.shape[0], student.head_VH.shape[0]
    if found != expected:
        raise ValueError(f"vocabulary: teacher has {found} entries, student {expected}")
    return teacher.detached().as_autocast()


def _rows(
    tokens: int,
    head_VH: Tensor,
    teacher: Projection | SparseTargets | None,
    term: Term,
    shard: VocabularyShard | None,
    chunk_tokens: int | None,
) -> tuple[int, int]:
    """Tokens of a chunk and of a group of chunks, see ``GROUP``."""
    if chunk_tokens is not None:
        return chunk_tokens, chunk_tokens
    entries = head_VH.shape[0] if shard is None else shard.largest or head_VH.shape[0]
    if head_VH.device.type == "cuda":
        models = 2 if isinstance(teacher, Projection) else 1
        widest_VH = head_VH.new_empty(1, 1).expand(entries, head_VH.shape[1])
        return cuda_rows(tokens, widest_VH, models, term.buffers)
    chunk = chunk_rows(tokens, entries, head_VH.device, term.buffers)
    return chunk, chunk


def _term(
    weights: LossWeights,
    teacher: Projection | SparseTargets | None,
    shard: VocabularyShard | None,
    compiled: bool,
    head_VH: Tensor,
) -> Term:
    """What evaluates a chunk."""
    kernels = kernels_for(head_VH.device, head_VH.dtype)
    if shard is not None:
        return Sharded(weights, shard, kernels)
    taught = teacher if weights.kl else None
    # to find the tokens that count, the host would have to wait for an accelerator
    skips = head_VH.device.type != "cpu"
    other = taught is not None and weights.divergence.name != "forward_kl"
    if kernels is None or isinstance(taught, SparseTargets) or other:
        return ByHand(weights, compiled, skips)
    return ByKernel(weights, kernels)


@dataclass(frozen=True)
class _LossInputs:
    """What the chunk loop works with, besides the two tensors that get gradients.

    Attributes:
        labels_T: next-token ids.
        count: tokens whose label is not negative: they count. A term that skips no others is given
            no others.
        weights: the mix.
        teacher: None where the loss needs none.
        softcap: the student's.
        term: evaluates a chunk.
        rows: tokens of a chunk, and of a group of chunks.
        wants_gradient: whether gradients are made.
        shard: see ``fused_linear_loss``.
    """

    labels_T: Tensor
    count: int | Tensor
    weights: LossWeights
    teacher: Projection | SparseTargets | None
    softcap: float | None
    term: Term
    rows: tuple[int, int]
    wants_gradient: bool
    shard: VocabularyShard | None


def _written(head_VH: Tensor, tokens: int) -> bool:
    """Whether the first product is written over what is in its sum, see ``add_products``."""
    return tokens > 0 and writes_fresh(head_VH)


class _Places:
    """Memory that all chunks use: new memory for each would cost more than the arithmetic.

    Attributes:
        student, teacher: of their logits, Tensor of shape [tokens of a chunk, vocabulary], both as
            wide as the student's; None: there is no teacher with logits.
        grads: of the gradients by the student's logits, [tokens of a group, vocabulary], on CUDA in
            the dtype of the products; None: they take the place of the logits.
    """

    def __init__(self, student: Projection, inputs: _LossInputs) -> None:
        entries, tokens = student.head_VH.shape[0], len(student.hidden_TH)
        chunk, group = (min(rows, tokens) for rows in inputs.rows)
        cuda = student.head_VH.device.type == "cuda"
        # rows that begin at multiples of 16 bytes, whatever the vocabulary
        width = -(-entries // 64) * 64 if cuda else entries

        def place(rows: int, dtype: torch.dtype) -> Tensor:
            return student.hidden_TH.new_empty((rows, width), dtype=dtype)[:, :entries]

        dtype = student.hidden_TH.dtype
        self.student = place(chunk, wide_dtype(dtype))
        taught = isinstance(inputs.teacher, Projection)
        self.teacher = place(chunk, wide_dtype(dtype)) if taught else None
        apart = inputs.wants_gradient and (cuda or inputs.term.skips)
        self.grads = place(group, dtype if cuda else wide_dtype(dtype)) if apart else None

    def gradient(self, part: slice, first: int) -> Tensor | None:
        """That of some tokens, of a group that begins at ``first``."""
        return None if self.grads is None else self.grads[part.start - first : part.stop - first]


class _FusedLinearLoss(torch.autograd.Function):
    """Computes the loss and, in the same sweep, both gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, student_TH: Tensor, head_VH: Tensor, inputs: _LossInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, divergence and cross-entropy, scalars."""
        wide = wide_dtype(student_TH.dtype)
        student = Projection(student_TH, head_VH, inputs.softcap)
        teacher = inputs.teacher
        if (
            inputs.term.skips
        ):  # what a token that does not count holds, a gradient of 0 would make NaN
            silent_T1 = (inputs.labels_T < 0)[:, None]
            student = student.without(silent_T1)
            teacher = teacher.without(silent_T1) if isinstance(teacher, Projection) else teacher
        student_TH = student.hidden_TH
        tokens, total = len(student_TH), student_TH.new_zeros(2, dtype=sum_dtype(student_TH.device))
        wants, (chunk, group) = inputs.wants_gradient, inputs.rows
        grad_TH = torch.zeros_like(student_TH, dtype=wide) if wants else None
        fresh = torch.empty_like if _written(head_VH, tokens) else torch.zeros_like
        grad_VH = fresh(head_VH, dtype=wide) if wants else None
        places = _Places(student, inputs)
        for first in range(0, tokens, group):
            whole = slice(first, min(first + group, tokens))
            for start in range(first, whole.stop, chunk):
                part = slice(start, min(start + chunk, whole.stop))
                taught = None if teacher is None else teacher[part]
                sums, grad_CV = inputs.term(
                    student[part].raw_logits(places.student),
                    taught.raw_logits(places.teacher) if isinstance(taught, Projection) else taught,
                    inputs.labels_T[part],
                    wants,
                    places.gradient(part, first),
                )
                total += sums
            grad_CV = places.gradient(whole, first) if places.grads is not None else grad_CV
            if grad_CV is not None and grad_TH is not None:
                add_products(
                    grad_CV, student_TH[whole], head_VH, grad_TH[whole], grad_VH, first == 0
                )
        count = inputs.count
        least = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        kl, ce = (total / least).to(wide)
        if grad_TH is not None and grad_VH is not None:
            whole_TH = grad_TH if inputs.shard is None else inputs.shard.reduce(grad_TH, "sum")
            ctx.save_for_backward(whole_TH, grad_VH)
            ctx.count, ctx.dtypes = least, (student_TH.dtype, head_VH.dtype)
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
        scale = grad_loss.to(grad_TH.dtype) / ctx.count
        return scaled(grad_TH, scale, ctx.dtypes[0]), scaled(grad_VH, scale, ctx.dtypes[1]), None
