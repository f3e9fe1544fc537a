"""torch: a causal LM on held-out text, alone and against its teacher, a chunk of logits at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.families import Family
from nemo_minitron.losses.fused_linear_loss import LossWeights, chunk_rows, fused_linear_loss
from nemo_minitron.losses.wide_matmul import wide_linear
from nemo_minitron.models.causal_lm import head_of, hidden_states, softcap_of


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out tokens.

    Attributes:
        loss: cross-entropy in nats.
        losses: the same for every sample.
        divergence: KL(teacher, model) in nats; None without a teacher.
        top1: share of the tokens where teacher and model find the same token most likely; None likewise.
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
    vocabulary: int | None = None,
) -> HeldOut:
    """Measures a model on packed samples.

    Args:
        model: a causal LM in evaluation mode.
        family: its family.
        tokens_NS: packed samples, Tensor of shape [samples, positions + 1].
        batch_size: samples per forward pass.
        teacher: another causal LM to compare it with, and its family.
        vocabulary: entries that count in the comparison, where the models pad theirs differently.
    """
    losses, divergence, same = [], 0.0, 0.0
    device, caps = head_of(model).device, [softcap_of(model, family), None]
    if teacher is not None:
        caps[1] = softcap_of(*teacher)
    for batch_BS in tokens_NS.split(batch_size):
        batch_BS = batch_BS.to(device)
        labels_BS = batch_BS[:, 1:]
        hidden_BSH = hidden_states(model, family, batch_BS[:, :-1])
        for hidden_SH, labels_S in zip(hidden_BSH, labels_BS, strict=True):
            alone = LossWeights(kl=0.0, ce=1.0)
            own = fused_linear_loss(hidden_SH, head_of(model), labels_S, alone, softcaps=(caps[0], None))
            losses.append(float(own.ce))
        if teacher is not None:
            teacher_TG = hidden_states(*teacher, batch_BS[:, :-1]).flatten(0, 1)
            pair = (teacher_TG, head_of(teacher[0]))
            hidden_TH = hidden_BSH.flatten(0, 1)
            terms = fused_linear_loss(
                hidden_TH, head_of(model), labels_BS.flatten(), LossWeights(), pair, None,
                (caps[0], caps[1]), vocabulary,
            )  # fmt: skip
            divergence += float(terms.divergence) * len(batch_BS)
            same += _same_choice(hidden_TH, head_of(model)[:vocabulary], *pair, vocabulary) * len(batch_BS)
    loss, samples = sum(losses) / len(losses), len(tokens_NS)
    if teacher is None:
        return HeldOut(loss, tuple(losses))
    return HeldOut(loss, tuple(losses), divergence / samples, same / samples)


def _same_choice(
    hidden_TH: Tensor, head_VH: Tensor, teacher_TG: Tensor, teacher_VG: Tensor, vocabulary: int | None
) -> float:
    """Top-1 agreement: share of tokens with the same most likely entry (a softcap changes no order)."""
    rows, same = chunk_rows(len(hidden_TH), head_VH.shape[0], head_VH.device, 2), 0
    for start in range(0, len(hidden_TH), rows):
        ours_C = wide_linear(hidden_TH[start : start + rows], head_VH).argmax(-1)
        theirs_C = wide_linear(teacher_TG[start : start + rows], teacher_VG[:vocabulary]).argmax(-1)
        same += int(torch.eq(ours_C, theirs_C).sum())
    return same / len(hidden_TH)
