"""Divergence and cross-entropy of one chunk of logits, and the gradient of their mix by the student's.

A term is what the chunk loop of ``fused_linear_loss`` calls: ``ByKernel`` for forward KL on a GPU,
``ByHand`` for it elsewhere and for any other divergence, ``vocabulary_parallel.Sharded`` for forward
KL where ranks share the vocabulary.
"""

import functools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.gradients import value_alone, value_and_gradient
from nemo_minitron.losses.projection import Logits
from nemo_minitron.losses.sparse_targets import SparseTargets
from nemo_minitron.losses.wide_matmul import sum_dtype

BLOCK_BYTES, CPU_BLOCK_BYTES = 64 * 2**20, 2**20
"""A chunk is passed over in blocks of rows; the CPU's stay in its cache."""
TEMPORARIES = 8
"""Tensors of a block's size that other divergences than forward KL take on an accelerator."""


@dataclass(frozen=True)
class LossWeights:
    """L = kl x divergence(teacher, student) + ce x cross-entropy, means over valid tokens."""

    kl: float = 1.0
    ce: float = 0.0
    divergence: Divergence = Divergence()


CROSS_ENTROPY = LossWeights(kl=0.0, ce=1.0)
"""The mix of a model that nobody teaches."""


class ChunkTerms(NamedTuple):
    """What a term finds in one chunk.

    Attributes:
        sums: of divergence (nats, where it is one of distributions) and cross-entropy (nats) over
            the chunk's tokens, Tensor of shape [2].
        grad_CV: gradient of kl x divergence + ce x cross-entropy, summed over the tokens, by the
            student's logits; None where it was not wanted.
    """

    sums: Tensor
    grad_CV: Tensor | None


class Term(Protocol):
    """Divergence and cross-entropy of a chunk.

    Attributes:
        skips: whether tokens whose label is negative may be among them, and count for nothing.
    """

    @property
    def skips(self) -> bool:
        """See the class."""

    @property
    def buffers(self) -> int:
        """Tensors of the logits' size that exist for each model, the logits among them."""

    def __call__(
        self,
        student: Logits,
        teacher: Logits | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
        place_CV: Tensor | None = None,
        /,
    ) -> ChunkTerms:
        """Evaluates one chunk; the logits may be overwritten.

        Args:
            student: logits, [tokens of the chunk, vocabulary].
            teacher: the teacher's, same shape, or what is known of them; None: cross-entropy only.
            labels_C: next-token ids, Tensor of shape [tokens of the chunk].
            wants_gradient: whether the gradient is made.
            place_CV: takes it, in its dtype; None: wherever it comes to lie.
        """


class Eager(ABC):
    """A term made of torch's operations."""

    def __call__(
        self,
        student: Logits,
        teacher: Logits | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
        place_CV: Tensor | None = None,
    ) -> ChunkTerms:
        """See ``Term``."""
        student_CV, slope_CV = student.capped_(), None
        if wants_gradient and student.cap is not None:  # before the term overwrites the logits
            slope_CV = student.slope()
        teacher_CV = teacher.capped_() if isinstance(teacher, Logits) else teacher
        mass_C = None if teacher is None else teacher.mass_T
        sums, grad_CV = self.evaluate(student_CV, teacher_CV, labels_C, wants_gradient, mass_C)
        if grad_CV is not None and slope_CV is not None:
            grad_CV = grad_CV.mul_(slope_CV)
        if grad_CV is not None and place_CV is not None:
            grad_CV = place_CV.copy_(grad_CV)
        return ChunkTerms(sums, grad_CV)

    @abstractmethod
    def evaluate(
        self,
        student_CV: Tensor,
        teacher_CV: Tensor | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
        mass_C: Tensor | None = None,
    ) -> ChunkTerms:
        """Evaluates one chunk from logits under their softcaps; see ``Term``."""


def kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Triton's kernels for logits in float32 on a GPU; None where there are none.

    Triton's own ``TRITON_INTERPRET=1`` runs them on the CPU, which shows that they are right.
    """
    if dtype == torch.float64:
        return None
    if device.type == "cuda":
        return _triton_kernels()
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return _triton_kernels() if interpreted else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The kernels' module, if Triton is there and can build one here (it needs a C compiler)."""
    if find_spec("triton") is None:
        return None
    try:
        from nemo_minitron.losses import kernels

        kernels.check("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # whatever Triton and its compiler raise
        line = (str(error).splitlines() or [""])[0]
        print(
            f"losses: Triton is installed and builds no kernel here ({type(error).__name__}: {line}); the "
            "loss runs as torch's operations, which takes longer",
            file=sys.stderr,
        )
        return None
    return kernels


@dataclass(frozen=True)
class ByKernel:
    """Forward KL and cross-entropy by Triton's kernels, softcaps among them.

    Attributes:
        weights: the mix; its divergence is forward KL, where there is a teacher.
        kernels: the module.
    """

    weights: LossWeights
    kernels: ModuleType
    buffers: int = 1
    skips: bool = True

    def __call__(
        self,
        student: Logits,
        teacher: Logits | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
        place_CV: Tensor | None = None,
    ) -> ChunkTerms:
        """See ``Term``."""
        assert not isinstance(teacher, SparseTargets)
        grad_CV = None
        if wants_gradient:
            grad_CV = torch.empty_like(student.raw_CV) if place_CV is None else place_CV
        chunk = self.kernels.Chunk(student, teacher, labels_C, self.weights)
        terms_C2 = chunk.terms(grad_CV)
        return ChunkTerms(terms_C2.sum(0, dtype=sum_dtype(terms_C2.device)), grad_CV)


@dataclass(frozen=True)
class ByHand(Eager):
    """Any divergence and cross-entropy, differentiated by hand, the gradient in the place of the logits.

    Attributes:
        weights: the mix.
        compiled: torch.compile makes kernels of it (Triton on a GPU): the same numbers but for
            rounding.
        skips: see ``Term``.
    """

    weights: LossWeights
    compiled: bool = False
    skips: bool = False
    buffers: int = 1

    def evaluate(
        self,
        student_CV: Tensor,
        teacher_CV: Tensor | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
        mass_C: Tensor | None = None,
    ) -> ChunkTerms:
        """See ``Term``; the student's logits become the gradient."""
        grad_CV = student_CV if wants_gradient else None
        how = (self.weights, wants_gradient, self.skips)
        in_place = _in_place(self.weights, teacher_CV, mass_C)
        terms = _compiled_terms() if self.compiled else _block_terms_
        if self.compiled and in_place:  # passes without a temporary: no need of blocks
            sums = terms(student_CV, teacher_CV, labels_C, mass_C, *how)
            return ChunkTerms(sums, grad_CV)
        rows, entries = student_CV.shape
        room = CPU_BLOCK_BYTES if student_CV.device.type == "cpu" else BLOCK_BYTES
        room = room if in_place or student_CV.device.type == "cpu" else room // TEMPORARIES
        size = max(1, room // (student_CV.element_size() * entries))
        sums = torch.zeros(2, dtype=sum_dtype(student_CV.device), device=student_CV.device)
        for block in (slice(start, start + size) for start in range(0, rows, size)):
            teacher_NV = None if teacher_CV is None else teacher_CV[block]
            mass_N = None if mass_C is None else mass_C[block]
            sums += terms(student_CV[block], teacher_NV, labels_C[block], mass_N, *how)
        return ChunkTerms(sums, grad_CV)


def _block_terms_(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor,
    mass_N: Tensor | None,
    weights: LossWeights,
    wants_gradient: bool,
    skips: bool,
) -> Tensor:
    """Sums of divergence and cross-entropy, Tensor of shape [2]; the student's logits become the gradient.

    Args:
        student_NV: logits.
        teacher: the teacher's, or what is known of them; None: cross-entropy only.
        labels_N: next-token ids.
        mass_N: by which share each token's divergence counts; None: whole.
        weights: the mix.
        wants_gradient: whether the gradient is made.
        skips: whether tokens whose label is negative are among them.
    """
    if teacher is None or _in_place(weights, teacher, mass_N):
        assert not isinstance(teacher, SparseTargets)
        return _forward_kl_(student_NV, teacher, labels_N, weights, wants_gradient, skips)
    column_N1 = labels_N[:, None]
    valid_N1 = column_N1 >= 0 if skips else None
    column_N1 = column_N1.clamp(min=0)
    grad_NV = log_own_N1 = None  # the latter: the student's normaliser at temperature 1
    if wants_gradient:
        value_N1, grad_NV, log_own_N1 = value_and_gradient(weights.divergence, teacher, student_NV)
    else:
        value_N1 = value_alone(weights.divergence, teacher, student_NV)
    # a large maximum would take the others' last digits
    student_NV -= student_NV.amax(-1, keepdim=True)
    if log_own_N1 is None or weights.divergence.temperature != 1:
        log_own_N1 = student_NV.exp().sum(-1, keepdim=True).log()
    share_N1 = torch.ones_like(value_N1) if mass_N is None else mass_N[:, None]
    wide, share_N1 = sum_dtype(student_NV.device), share_N1.to(student_NV.dtype)
    divergence = _counted(value_N1 * share_N1, valid_N1).to(wide).sum()
    ce_N1 = log_own_N1 - student_NV.gather(1, column_N1)
    ce = _counted(ce_N1, valid_N1).to(wide).sum()
    if grad_NV is not None:
        by_ce_N1 = _counted(torch.full_like(ce_N1, weights.ce), valid_N1)
        if weights.ce != 0:
            student_NV.sub_(log_own_N1).exp_().mul_(by_ce_N1).scatter_add_(1, column_N1, -by_ce_N1)
        else:
            student_NV.zero_()
        student_NV.addcmul_(grad_NV, _counted(share_N1 * weights.kl, valid_N1))
    return torch.stack([divergence, ce])


def _in_place(
    weights: LossWeights, teacher: Tensor | SparseTargets | None, mass_N: Tensor | None
) -> bool:
    """Whether ``_forward_kl_`` does it, which takes no memory beside the logits."""
    whole = not isinstance(teacher, SparseTargets) and mass_N is None
    return teacher is None or (whole and weights.divergence.name == "forward_kl")


def _forward_kl_(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    labels_N: Tensor,
    weights: LossWeights,
    wants_gradient: bool,
    skips: bool,
) -> Tensor:
    """``_block_terms_`` of forward KL with the fewest passes over the logits.

    With x and y the logits over the temperature t, less their maxima, p = e^y / P and q = e^x / Q:
    KL = sum p (y - x) - log P + log Q, and the gradient of t^2 KL by the student's logits is t (q -
    p) (arXiv 1503.02531 eq. 2). Values and gradients are checked against autograd of the textbook
    formula in
    float64: tests/losses/test_fused_linear_loss.py, ``test_values_and_gradients``.
    """
    tau, wide, valid_N1 = weights.divergence.temperature, sum_dtype(student_NV.device), None
    column = labels_N[:, None]
    if skips:
        valid_N1, column = column >= 0, column.clamp(min=0)
    student_NV -= student_NV.amax(-1, keepdim=True)
    picked_N1 = student_NV.gather(1, column)
    minus_N1 = _counted(picked_N1.new_full(column.shape, -weights.ce), valid_N1)
    if teacher_NV is None:
        total_N1 = student_NV.exp_().sum(-1, keepdim=True)
        ce = _counted(total_N1.log() - picked_N1, valid_N1).to(wide).sum()
        if wants_gradient:
            student_NV *= _counted(weights.ce / total_N1, valid_N1)
            student_NV.scatter_add_(1, column, minus_N1)
        return torch.stack([torch.zeros_like(ce), ce])
    teacher_NV -= teacher_NV.amax(-1, keepdim=True)
    own_NV, own_N1 = None, None  # the student's at temperature 1, if that is another
    if tau != 1:
        own_NV = student_NV.exp()
        own_N1 = own_NV.sum(-1, keepdim=True)
        student_NV /= tau
        teacher_NV /= tau
    gap_NV = teacher_NV - student_NV
    total_p_N1 = teacher_NV.exp_().sum(-1, keepdim=True)
    total_q_N1 = student_NV.exp_().sum(-1, keepdim=True)
    mean_gap_N1 = gap_NV.mul_(teacher_NV).sum(-1, keepdim=True) / total_p_N1
    kl_N1 = _counted(mean_gap_N1 - total_p_N1.log() + total_q_N1.log(), valid_N1)
    ce_N1 = (total_q_N1 if own_N1 is None else own_N1).log() - picked_N1
    kl, ce = kl_N1.to(wide).sum() * tau**2, _counted(ce_N1, valid_N1).to(wide).sum()
    if wants_gradient:
        by_q = weights.kl * tau + (weights.ce if own_N1 is None else 0.0)
        student_NV *= _counted(by_q / total_q_N1, valid_N1)
        student_NV.addcmul_(teacher_NV, _counted(weights.kl * tau / total_p_N1, valid_N1), value=-1)
        if weights.ce != 0:
            if own_NV is not None and own_N1 is not None:
                student_NV.addcmul_(own_NV, _counted(weights.ce / own_N1, valid_N1))
            student_NV.scatter_add_(1, column, minus_N1)
    return torch.stack([kl, ce])


def _counted(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zeros where a token does not count; None: all do."""
    return values if valid is None else torch.where(valid, values, 0)


@functools.cache
def _compiled_terms() -> Callable[..., Tensor]:
    return torch.compile(_block_terms_)
