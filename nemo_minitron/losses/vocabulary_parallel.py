"""Forward KL and cross-entropy where ranks share the vocabulary: each has some rows of both heads.

A rank makes the logits of its rows only. What is exchanged: per chunk of tokens the normalisers and
the terms, and at the end the gradient of the hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from nemo_minitron.losses.loss_terms import ChunkTerms, Eager, LossWeights
from nemo_minitron.losses.projection import Logits, softcapped
from nemo_minitron.losses.sparse_targets import SparseTargets
from nemo_minitron.losses.wide_matmul import sum_dtype

Reduce = Callable[[Tensor, str], Tensor]
"""Of a tensor and ``sum`` or ``max``: the same over all ranks that share the vocabulary, on each of them."""


@dataclass(frozen=True)
class VocabularyShard:
    """The part of a vocabulary whose rows of the heads a rank holds.

    Attributes:
        first: the entry that the rank's first row stands for.
        reduce: sums and maxima over the ranks.
        largest: rows of the rank that holds most of them; None: all hold as many. All ranks must
            take the same chunks of tokens, or their reductions do not meet.
    """

    first: int
    reduce: Reduce
    largest: int | None = None

    def log_softmax(self, logits_CW: Tensor) -> Tensor:
        """Logarithms of the softmax over all ranks' entries; [tokens, entries of this rank] to the same."""
        top_C = self.reduce(logits_CW.amax(-1), "max")
        shifted_CW = logits_CW - top_C[:, None]
        return shifted_CW - self.reduce(shifted_CW.exp().sum(-1), "sum").log()[:, None]


@dataclass(frozen=True, eq=False)
class RowSums:
    """Of every token, over all entries of the vocabulary; each of shape [tokens], float32.

    Attributes:
        x_C, y_C: largest logit of student and teacher.
        own_C: sum of e^(x - max), the student's at temperature 1.
        q_C, p_C: of e^((x - max) / t), the student's and the teacher's.
        gap_C: of e^((y - max) / t) (y - x) / t.
    """

    x_C: Tensor
    own_C: Tensor
    q_C: Tensor
    y_C: Tensor
    p_C: Tensor
    gap_C: Tensor

    def as_rows(self) -> Tensor:
        """As the kernels read them: [tokens, 8]."""
        columns = [self.x_C, self.own_C, self.q_C, self.y_C, self.p_C, self.gap_C]
        return torch.stack([*columns, *(2 * [torch.zeros_like(self.x_C)])], 1)

    def terms(self, picked_C: Tensor, tau: float | None) -> tuple[Tensor, Tensor]:
        """t^2 KL (0 without a temperature: there is no teacher) and cross-entropy of each token.

        Args:
            picked_C: the student's logits of the labels.
            tau: t.
        """
        ce_C = self.own_C.log() + self.x_C - picked_C
        if tau is None:
            return torch.zeros_like(ce_C), ce_C
        kl_C = self.gap_C / self.p_C - self.p_C.log() + self.q_C.log()
        return (kl_C + (self.x_C - self.y_C) / tau) * tau**2, ce_C


@dataclass(frozen=True)
class Sharded(Eager):
    """The term of a rank, see ``loss_terms.Term``; its labels are ids of the whole vocabulary.

    Attributes:
        weights: the mix; its divergence is forward KL.
        shard: the rank's part.
        kernels: Triton's, see ``loss_terms.kernels_for``; None: torch's operations.
    """

    weights: LossWeights
    shard: VocabularyShard
    kernels: ModuleType | None = None

    @property
    def skips(self) -> bool:
        """See ``Term``."""
        return self.kernels is not None

    @property
    def buffers(self) -> int:
        """See ``Term``."""
        return 3 if self.kernels is None else 1

    def __post_init__(self) -> None:
        """Refuses what does not split.

        Raises:
            ValueError: another divergence than forward KL.
        """
        if self.weights.divergence.name != "forward_kl":
            raise ValueError(
                f"a split vocabulary: expected forward_kl, found {self.weights.divergence.name}"
            )

    def __call__(
        self,
        student: Logits,
        teacher: Logits | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
        place_CV: Tensor | None = None,
    ) -> ChunkTerms:
        """See ``Term``."""
        if self.kernels is None:
            return super().__call__(student, teacher, labels_C, wants_gradient, place_CV)
        assert not isinstance(teacher, SparseTargets)
        assert teacher is None or teacher.mass_T is None  # the ranks' sums know of no shares
        entries, valid_C = student.raw_CV.shape[1], labels_C >= 0
        own_C = labels_C - self.shard.first
        mine_C = valid_C & (own_C >= 0) & (own_C < entries)
        # a label of another rank's is none of these entries, and one that does not count stays
        # negative
        own_C = torch.where(mine_C, own_C, torch.where(valid_C, entries, -1))
        chunk = self.kernels.Chunk(student, teacher, own_C, self.weights)
        sums = self._all_sums(chunk.sums(), 1.0 if teacher is None else self._tau)
        grad_CV = None
        if wants_gradient:
            grad_CV = torch.empty_like(student.raw_CV) if place_CV is None else place_CV
            chunk.gradient(sums.as_rows(), grad_CV)
        picked_C = student.raw_CV.gather(1, own_C.clamp(0, entries - 1)[:, None])[:, 0]
        picked_C = self.shard.reduce(softcapped(picked_C, student.cap) * mine_C, "sum")
        terms_C2 = torch.stack(sums.terms(picked_C, None if teacher is None else self._tau), 1)
        total = torch.where(valid_C[:, None], terms_C2, 0).sum(0, dtype=sum_dtype(labels_C.device))
        return ChunkTerms(total, grad_CV)

    @property
    def _tau(self) -> float:
        return self.weights.divergence.temperature

    def _all_sums(self, parts: Tensor, tau: float) -> "RowSums":
        """Sums over the parts of a row, of all ranks."""
        reduce = self.shard.reduce
        x_C, y_C = (reduce(parts[..., column].amax(1), "max") for column in (0, 3))
        by_x, by_y = (
            ((parts[..., column] - top_C[:, None]) / scale).exp()
            for column, top_C, scale in ((0, x_C, 1.0), (3, y_C, tau))
        )
        softer = by_x if tau == 1 else ((parts[..., 0] - x_C[:, None]) / tau).exp()
        scaled = [
            parts[..., column] * scale
            for column, scale in ((1, by_x), (2, softer), (4, by_y), (5, by_y))
        ]
        own_C, q_C, p_C, gap_C = reduce(torch.stack([part.sum(1) for part in scaled]), "sum")
        return RowSums(x_C, own_C, own_C if tau == 1 else q_C, y_C, p_C, gap_C)

    def evaluate(
        self,
        student_CW: Tensor,
        teacher_CW: Tensor | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
        mass_C: Tensor | None = None,
    ) -> ChunkTerms:
        """Sums over all ranks' entries, and the gradient by this rank's logits.

        The gradient of ce x cross-entropy is ce (q - label), that of kl x t^2 KL is kl t (q - p),
        both by logits, at their temperatures 1 and t. Values and gradients are checked against the
        whole vocabulary: tests/losses/test_vocabulary_parallel.py,
        ``test_ranks_together_have_the_loss_and_gradients_of_one``.
        """
        assert not isinstance(teacher_CW, SparseTargets) and mass_C is None
        tau, rows = self.weights.divergence.temperature, student_CW.shape[1]
        own_C = labels_C - self.shard.first
        log_q1_CW = self.shard.log_softmax(student_CW)
        mine_C = (own_C >= 0) & (own_C < rows)
        picked_C = log_q1_CW.gather(1, own_C.clamp(0, rows - 1)[:, None])[:, 0] * mine_C
        grad_CW = None
        if wants_gradient:
            grad_CW = log_q1_CW.exp()
            grad_CW[mine_C.nonzero()[:, 0], own_C[mine_C]] -= 1
            grad_CW *= self.weights.ce
        kl = torch.zeros((), dtype=sum_dtype(student_CW.device), device=student_CW.device)
        if teacher_CW is not None:
            log_p_CW = self.shard.log_softmax(teacher_CW / tau)
            log_q_CW = log_q1_CW if tau == 1 else self.shard.log_softmax(student_CW / tau)
            p_CW = log_p_CW.exp()
            kl = (p_CW * (log_p_CW - log_q_CW)).sum(-1).to(kl.dtype).sum() * tau**2
            if grad_CW is not None:
                grad_CW += (log_q_CW.exp() - p_CW) * (self.weights.kl * tau)
        sums = torch.stack([kl, -picked_C.to(kl.dtype).sum()])
        return ChunkTerms(self.shard.reduce(sums, "sum"), grad_CW)
