"""Which texts of a calibration mixture use which experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_minitron.security.plain_text import plain

RARE = 0.1
"""An expert that gets less than this part of an equal share of a layer's tokens is rarely used."""


def shares(counts: Tensor) -> Tensor:
    """Each expert's share of the tokens of its layer; 0 in layers without experts.

    Args:
        counts: tokens that came to each expert, int64, [..., layers, experts].

    Returns:
        Tensor of the same shape, float64.
    """
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def effective_experts(counts: Tensor) -> float:
    """How many experts a text uses: the exponential of the entropy of its shares, mean over layers.

    Args:
        counts: tokens that came to each expert, int64, [layers, experts].
    """
    share_LE = shares(counts)[counts.sum(-1) > 0]
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(-1)
    return float(entropy_L.exp().mean()) if len(share_LE) else 0.0


def overlap(counts: Tensor, others: Tensor) -> float:
    """How alike two texts use the experts: sum of the smaller of their shares, mean over layers; 1: alike.

    Args:
        counts: tokens of one text that came to each expert, int64, [layers, experts].
        others: those of the other.
    """
    seen_L = (counts.sum(-1) > 0) & (others.sum(-1) > 0)
    smaller_LE = torch.minimum(shares(counts), shares(others))[seen_L]
    return float(smaller_LE.sum(-1).mean()) if len(smaller_LE) else 0.0


def kept_share(counts: Tensor, keep_LK: Tensor) -> float:
    """Share of a text's choices of experts that stay, when only some experts do.

    Args:
        counts: tokens of the text that came to each expert, int64, [layers, experts].
        keep_LK: the experts that stay, int64, [layers, kept].
    """
    return float(counts.gather(1, keep_LK).sum() / counts.sum().clamp(min=1))


def routing_notes(texts: Sequence[str], by_text: Tensor) -> list[str]:
    """Lines on the experts that each text uses, and on those that hardly any does.

    Args:
        texts: their names.
        by_text: tokens that came to each expert, int64, [texts, layers, experts].
    """
    whole_LE, experts = by_text.sum(0), by_text.shape[-1]
    lines = []
    if len(texts) > 1:
        for name, counts in zip(texts, by_text, strict=True):
            lines.append(
                f"{plain(name, 80)}: uses {effective_experts(counts):.1f} of {experts} experts, "
                f"{overlap(counts, whole_LE - counts):.0%} alike with the other texts"
            )
    has_L = whole_LE.sum(-1) > 0
    rare = int((shares(whole_LE)[has_L] < RARE / experts).sum())
    if rare:
        lines.append(
            f"{rare} of {int(has_L.sum()) * experts} experts get less than a tenth of an equal share of the "
            "tokens: a text, or a language, that needs them may be missing from data.calibration"
        )
    return lines


def kept_notes(texts: Sequence[str], by_text: Tensor, keep_LK: Tensor) -> list[str]:
    """A line on what the kept experts mean to each text; none of a single text.

    Args:
        texts: their names.
        by_text: tokens that came to each expert, int64, [texts, layers, experts].
        keep_LK: the experts that stay, int64, [layers, kept].
    """
    if len(texts) < 2:
        return []
    each = ", ".join(
        f"{plain(name, 80)} {kept_share(counts, keep_LK):.0%}"
        for name, counts in zip(texts, by_text, strict=True)
    )
    return [f"of each text's choices of experts, those that stay had: {each}"]
