"""transformers: runs the teacher over the samples, part by part, and keeps a few entries of its logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_minitron.families import Family
from nemo_minitron.losses.fused_linear_loss import chunk_rows
from nemo_minitron.losses.kept_entries import Entries, read_by_teacher, shared
from nemo_minitron.losses.sparse_targets import SparseTargets, known_entries
from nemo_minitron.models.causal_lm import frozen, head_of, hidden_states, projection_of


@dataclass(frozen=True)
class Kept:
    """What is kept of the teacher's logits of a token.

    Attributes:
        method: see ``losses.sparse_targets.known_entries``.
        entries: likewise.
        temperature: likewise.
        seed: of the draw.
        vocabulary: entries that count; of a student whose vocabulary was cut, which it has; None: all.
    """

    method: str
    entries: int
    temperature: float
    seed: int
    vocabulary: Entries = None


def teach(
    model: Any,
    family: Family,
    samples: Any,
    rows: Sequence[int],
    kept: Kept,
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[SparseTargets, float]:
    """Runs the teacher over some samples.

    Args:
        model: the teacher, on its device.
        family: its table.
        samples: packed samples, each [positions + 1]; negative entries ~id are read as id.
        rows: which.
        kept: what is kept of a token's logits.
        batch_size: samples per forward pass.
        advance: called with the number of tokens that are done.

    Returns:
        Targets of rows x positions tokens on the CPU, and the mean share of the teacher's mass that
        they name (of samples: 1).
    """
    device, dtype = next(model.parameters()).device, head_of(model).dtype
    generator = torch.Generator(device).manual_seed(kept.seed)
    found: list[SparseTargets] = []
    for start in range(0, len(rows), batch_size):
        batch_BS = torch.stack([samples[row] for row in rows[start : start + batch_size]])
        tokens_BS = torch.where(batch_BS < 0, ~batch_BS, batch_BS)[:, :-1].to(device)
        with frozen(model):
            hidden_TG = (
                hidden_states(model, family, read_by_teacher(kept.vocabulary, tokens_BS))
                .flatten(0, 1)
                .to(dtype)
            )
            teacher = shared(
                kept.vocabulary, projection_of(model, family, hidden_TG), kept.temperature
            )
            chunk = chunk_rows(len(hidden_TG), teacher.head_VH.shape[0], device, 3)
            for first in range(0, len(hidden_TG), chunk):
                part = teacher[first : first + chunk]
                targets = known_entries(
                    part.logits(), kept.method, kept.entries, kept.temperature, generator
                )
                targets = replace(targets, mass_T=part.mass_T)
                found.append(targets.to(torch.device("cpu")))
        advance(tokens_BS.numel())
    return _joined(found)


def _joined(found: Sequence[SparseTargets]) -> tuple[SparseTargets, float]:
    ids_TK = torch.cat([targets.ids_TK for targets in found])
    masses = [targets.mass_T for targets in found if targets.mass_T is not None]
    mass_T = torch.cat(masses) if masses else None
    if found[0].log_p_TK is None:
        return SparseTargets(ids_TK, mass_T=mass_T), 1.0
    log_p_TK, log_tail_T = (
        torch.cat([getattr(targets, name) for targets in found])
        for name in ("log_p_TK", "log_tail_T")
    )
    return SparseTargets(ids_TK, log_p_TK, log_tail_T, mass_T), float(log_p_TK.exp().sum(-1).mean())
