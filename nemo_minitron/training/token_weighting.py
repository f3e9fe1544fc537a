"""The tokens of a step that are learned: each weighs the same, in whatever micro-batch or rank it is.

An objective is a mean over the learned tokens of a micro-batch; Lightning divides the sum over
micro-batches by how many a whole step has, and takes the mean over ranks. Where they have different
numbers of tokens (``data.train.learn_from=answers``, a collator that pads to the longest sample) a mean
of means would give a token of a short answer the weight of a hundred of a long one, and where an epoch
ends in the midst of a step its gradient would be too small.

So each micro-batch's mean counts as often as it has learned tokens, in units that are one number for the
whole step: the size of its first micro-batch. Where all have that size, and all of it is learned, nothing
is multiplied by anything but 1.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from nemo_minitron.losses.fused_linear_loss import LossResult
from nemo_minitron.losses.wide_matmul import sum_dtype
from nemo_minitron.training.batches import as_batch


class LearnedTokens:
    """Counts a step's tokens, and weighs its gradients and its terms by them.

    Attributes:
        last: learned tokens of the last micro-batch, a scalar.
    """

    def __init__(self) -> None:
        self.last = torch.zeros((), dtype=torch.long)
        self._counts: list[Tensor] = []
        self._unit: int | Tensor = 1
        self._terms: list[dict[str, Tensor]] = []
        self._step: tuple[Tensor, dict[str, Tensor]] | None = None

    def note(self, terms: LossResult) -> None:
        """Keeps the terms of the micro-batch whose ``share`` was asked for last."""
        self._terms.append(terms.named())

    def means(self, strategy: Any) -> dict[str, float]:
        """Terms of the last whole step: means over its learned tokens, in all micro-batches and ranks."""
        assert self._step is not None
        tokens, sums = self._step
        parts = torch.stack([tokens, *sums.values()])
        whole, *values = strategy.reduce(parts, reduce_op="sum").tolist()
        return {name: value / max(whole, 1) for name, value in zip(sums, values, strict=True)}

    def begin(self) -> None:
        """Begins a step: what is left of one that was never taken, as its training ended, is forgotten."""
        self._counts, self._terms = [], []

    def share(self, batch: Any, trainer: Any) -> Tensor:
        """What a micro-batch's objective is to be multiplied by: its learned tokens, in the step's unit.

        Args:
            batch: see ``training.batches.as_batch``.
            trainer: Lightning's Trainer, or None where there is none; all its ranks call it.
        """
        labels_BS = as_batch(batch).labels_BS
        self.last = (labels_BS >= 0).sum()
        if not self._counts:
            self._unit = _of_all_ranks(max(labels_BS.numel(), 1), self.last, trainer)
        self._counts.append(self.last)
        return self.last / self._unit

    def weigh(self, gradients: list[Tensor], trainer: Any) -> None:
        """Makes the gradients of a step those of the mean over its learned tokens.

        Args:
            gradients: of its last micro-batch and those before, as Lightning has added them up.
            trainer: Lightning's Trainer; all its ranks call it.
        """
        learned = torch.stack(self._counts).sum()
        # what Lightning has divided by, also where the step has fewer micro-batches than others
        divisor = torch.zeros_like(learned) + self._unit * trainer.accumulate_grad_batches
        counts = torch.stack([learned, divisor])
        wide = sum_dtype(counts.device)
        tokens = [count.to(wide) for count in self._counts]
        sums = {
            name: torch.stack(
                [t[name].to(wide) * n for t, n in zip(self._terms, tokens, strict=True)]
            ).sum()
            for name in self._terms[0]
        }
        self._step = (learned.to(wide), sums)
        self.begin()
        whole = trainer.strategy.reduce(counts, reduce_op="sum")
        if whole.device.type != "cpu":
            _scale(gradients, (whole[1] / whole[0].clamp_min(1)).float())
            return
        tokens_learned, divided_by = whole.tolist()
        if tokens_learned not in (0, divided_by):
            for gradient in gradients:
                gradient.mul_(divided_by / tokens_learned)


def _of_all_ranks(size: int, like: Tensor, trainer: Any) -> int | Tensor:
    """A number that all ranks know: the largest of theirs, since their averages allow for one alone.

    Lightning's own reduction has a barrier before it, for which the host waits.
    """
    if trainer is None or trainer.world_size == 1 or not distributed.is_initialized():
        return size
    largest = torch.full_like(like, size)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return largest


@torch.no_grad()
def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Gradients times a number that the host does not know yet; those of no learned token are zero."""
    here = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
    torch._foreach_mul_(here, factor)
