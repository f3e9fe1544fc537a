"""The tokens of a step that are learned: each weighs the same, in whatever micro-batch or rank it is.

An objective is a mean over the learned tokens of a micro-batch; Lightning takes the mean over
micro-batches and ranks. Where they have different numbers of them
(``data.train.learn_from=answers``) a mean of means would give a token of a short answer the weight
of a hundred of a long one.
"""

from typing import Any

import torch
from torch import Tensor

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

    def share(self, batch: Any) -> Tensor:
        """Share of a micro-batch's tokens that are learned, by which its objective is to be multiplied.

        Args:
            batch: see ``training.batches.as_batch``.
        """
        labels_BS = as_batch(batch).labels_BS
        self.last = (labels_BS >= 0).sum()
        self._counts.append(torch.stack([self.last, torch.full_like(self.last, labels_BS.numel())]))
        return self.last / labels_BS.numel()

    def weigh(self, gradients: list[Tensor], strategy: Any) -> None:
        """Makes the gradients of a whole step those of the mean over its learned tokens."""
        counts = torch.stack(self._counts).sum(0)
        wide = sum_dtype(counts.device)
        tokens = [count[0].to(wide) for count in self._counts]
        sums = {
            name: torch.stack(
                [t[name].to(wide) * n for t, n in zip(self._terms, tokens, strict=True)]
            ).sum()
            for name in self._terms[0]
        }
        self._step, self._counts, self._terms = (counts[0].to(wide), sums), [], []
        whole = strategy.reduce(counts, reduce_op="sum")
        if whole.device.type != "cpu":
            _scale(gradients, (whole[1] / whole[0].clamp_min(1)).float())
            return
        learned, tokens = whole.tolist()
        if 0 < learned < tokens:
            for gradient in gradients:
                gradient.mul_(tokens / learned)


@torch.no_grad()
def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Gradients times a number that the host does not know yet; those of no learned token are zero."""
    here = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
    torch._foreach_mul_(here, factor)
