"""Forward KL and cross-entropy where ranks share the vocabulary: each has some rows of both heads.

A rank makes the logits of its rows only. What is exchanged: per chunk of tokens the normalisers and
the terms, and at the end the gradient of the hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.losses.loss_terms import ChunkTerms, LossWeights
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


@dataclass(frozen=True)
class Sharded:
    """The term of a rank, see ``loss_terms.Term``; its labels are ids of the whole vocabulary.

    Attributes:
        weights: the mix; its divergence is forward KL.
        shard: the rank's part.
    """

    weights: LossWeights
    shard: VocabularyShard
    buffers: int = 3

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
        student_CW: Tensor,
        teacher_CW: Tensor | SparseTargets | None,
        labels_C: Tensor,
        wants_gradient: bool,
    ) -> ChunkTerms:
        """Sums over all ranks' entries, and the gradient by this rank's logits.

        The gradient of ce x cross-entropy is ce (q - label), that of kl x t^2 KL is kl t (q - p),
        both by logits, at their temperatures 1 and t. Values and gradients are checked against the
        whole vocabulary: tests/losses/test_vocabulary_parallel.py,
        ``test_ranks_together_have_the_loss_and_gradients_of_one``.
        """
        assert not isinstance(teacher_CW, SparseTargets)
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
