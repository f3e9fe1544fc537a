"""torch: a causal LM on held-out text, alone and against its teacher, a chunk of logits at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.families import Family
from nemo_minitron.losses.fused_linear_loss import (
    LossWeights,
    chunk_rows,
    cross_entropy,
    fused_linear_loss,
)
from nemo_minitron.losses.kept_entries import Entries, read_by_teacher, shared
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.wide_matmul import wide_linear
from nemo_minitron.models.causal_lm import head_of, hidden_states, projection_of


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out tokens.

    Attributes:
        loss: cross-entropy in nats.
        losses: the same for every sample.
        divergence: KL(teacher, model) in nats; None without a teacher.
        top1: share of the tokens where teacher and model find the same token most likely; None
            likewise.
    """

    loss: float
    losses: tuple[float, ...]
    divergence: float | None = None
    top1: float | None = None


def held_out_loss(model: Any, family: Family, tokens_NS: Tensor, batch_size: int) -> float:
    """Mean cross-entropy in nats per token; arguments as in ``held_out``."""
    return held_out(model, family, tokens_NS, batch_size).loss


def held_out(
    model: Any,
    family: Family,
    tokens_NS: Tensor,
    batch_size: int,
    teacher: tuple[Any, Family] | None = None,
    vocabulary: Entries = None,
) -> HeldOut:
    """Measures a model on packed samples.

    Args:
        model: a causal LM in evaluation mode.
        family: its family.
        tokens_NS: packed samples, Tensor of shape [samples, positions + 1]; what is negative fills
            shorter ones up, and does not count.
        batch_size: samples per forward pass.
        teacher: another causal LM to compare it with, and its family.
        vocabulary: entries that count in the comparison, where the models pad theirs differently, or
            which of the teacher's the model has.
    """
    losses, divergence, same = [], 0.0, 0.0
    device = head_of(model).device
    for batch_BS in tokens_NS.split(batch_size):
        batch_BS = batch_BS.to(device)
        labels_BS, read_BS = batch_BS[:, 1:], batch_BS[:, :-1].clamp(min=0)
        hidden_BSH = hidden_states(model, family, read_BS)
        for hidden_SH, labels_S in zip(hidden_BSH, labels_BS, strict=True):
            losses.append(
                float(cross_entropy(projection_of(model, family, hidden_SH), labels_S).ce)
            )
        if teacher is not None:
            ours = projection_of(model, family, hidden_BSH.flatten(0, 1))
            read_BS = read_by_teacher(vocabulary, read_BS)
            theirs = projection_of(*teacher, hidden_states(*teacher, read_BS).flatten(0, 1))
            theirs, labels_T = shared(vocabulary, theirs), labels_BS.flatten()
            ours = ours.counted(vocabulary if isinstance(vocabulary, int) else None)
            terms = fused_linear_loss(ours, labels_T, LossWeights(), theirs)
            divergence += float(terms.divergence) * len(batch_BS)
            counted_T = labels_T >= 0
            if not counted_T.all():
                ours, theirs = ours[counted_T], theirs[counted_T]
            same += _same_choice(ours, theirs) * len(batch_BS)
    loss, samples = sum(losses) / len(losses), len(tokens_NS)
    if teacher is None:
        return HeldOut(loss, tuple(losses))
    return HeldOut(loss, tuple(losses), divergence / samples, same / samples)


def _same_choice(ours: Projection, theirs: Projection) -> float:
    """Top-1 agreement: share of tokens with the same most likely entry (a softcap changes no order)."""
    tokens, same = len(ours.hidden_TH), 0
    rows = chunk_rows(tokens, ours.head_VH.shape[0], ours.head_VH.device, 2)
    for part in (slice(start, start + rows) for start in range(0, tokens, rows)):
        ours_C = wide_linear(ours.hidden_TH[part], ours.head_VH).argmax(-1)
        theirs_C = wide_linear(theirs.hidden_TH[part], theirs.head_VH).argmax(-1)
        same += int(torch.eq(ours_C, theirs_C).sum())
    return same / tokens
