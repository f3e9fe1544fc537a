"""Hidden states and the head that makes logits of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_minitron.losses.wide_matmul import wide_linear


@dataclass(frozen=True, eq=False)
class Projection:
    """One model's last hidden states and its output projection.

    Attributes:
        hidden_TH: what the head gets, Tensor of shape [tokens, hidden].
        head_VH: its weight, Tensor of shape [vocabulary, hidden].
        softcap: c of logits x that are c tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2); None:
            no cap.
        mass_T: by which share of a teacher's distribution each token counts, Tensor of shape [tokens];
            None: each counts whole.
    """

    hidden_TH: Tensor
    head_VH: Tensor
    softcap: float | None = None
    mass_T: Tensor | None = None

    def __getitem__(self, index: slice | Tensor) -> "Projection":
        """That of some tokens."""
        mass_T = None if self.mass_T is None else self.mass_T[index]
        return replace(self, hidden_TH=self.hidden_TH[index], mass_T=mass_T)

    def counted(self, vocabulary: int | None) -> "Projection":
        """Without the entries that only pad the head; None: all of them count."""
        return self if vocabulary is None else replace(self, head_VH=self.head_VH[:vocabulary])

    def without(self, silent_T1: Tensor) -> "Projection":
        """Zeros in the place of some tokens' hidden states; a mask of shape [tokens, 1]."""
        return replace(self, hidden_TH=self.hidden_TH.masked_fill(silent_T1, 0))

    def detached(self) -> "Projection":
        """The same, without gradients."""
        return replace(self, hidden_TH=self.hidden_TH.detach(), head_VH=self.head_VH.detach())

    def as_autocast(self) -> "Projection":
        """In the low precision, where autocast is on: the product runs in it, its sums do not."""
        device = self.hidden_TH.device.type
        if not torch.is_autocast_enabled(device):
            return self
        low = torch.get_autocast_dtype(device)
        return replace(self, hidden_TH=self.hidden_TH.to(low), head_VH=self.head_VH.to(low))

    def raw_logits(self, place_CV: Tensor | None = None) -> "Logits":
        """Logits before the softcap, [tokens, vocabulary], float32 (float64 of float64).

        Args:
            place_CV: its first rows take the result; None: new memory.
        """
        raw_CV = wide_linear(self.hidden_TH, self.head_VH, place_CV)
        return Logits(raw_CV, self.softcap, self.mass_T)

    def logits(self) -> Tensor:
        """Logits under the softcap, Tensor of shape [tokens, vocabulary], float32 (float64 of float64)."""
        return self.raw_logits().capped_()


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits before their softcap.

    Attributes:
        raw_CV: Tensor of shape [tokens, vocabulary].
        cap: the softcap, or None.
        mass_T: see ``Projection``.
    """

    raw_CV: Tensor
    cap: float | None = None
    mass_T: Tensor | None = None

    def capped_(self) -> Tensor:
        """The logits, in their place."""
        return self.raw_CV if self.cap is None else softcap_(self.raw_CV, self.cap)

    def slope(self) -> Tensor:
        """Derivative by the raw logits, once they have been capped in place."""
        assert self.cap is not None
        return softcap_slope(self.raw_CV, self.cap)


def softcap_(logits_TV: Tensor, cap: float) -> Tensor:
    """C tanh(x / c) in the place of the logits x."""
    return logits_TV.div_(cap).tanh_().mul_(cap)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """The logits under a softcap, if there is one."""
    return logits if cap is None else softcap_(logits.clone(), cap)


def softcap_slope(capped_TV: Tensor, cap: float) -> Tensor:
    """Derivative of the softcap by its argument, 1 - tanh(x / c)^2, from its results."""
    return 1 - (capped_TV / cap).square()
