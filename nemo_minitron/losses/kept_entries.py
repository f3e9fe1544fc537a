"""A teacher whose student has only some of its vocabulary's entries.

The student's text is made of its own entries, each of which is one of the teacher's. The teacher reads
these, and its distribution is taken over them: softmax over some logits is the whole softmax, given
that one of them comes next.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nemo_minitron.losses.fused_linear_loss import chunk_rows
from nemo_minitron.losses.projection import Projection

OUTSIDE = ("renormalise", "tail")


@dataclass(frozen=True, eq=False)
class KeptEntries:
    """The entries of a teacher's vocabulary that its student has.

    Attributes:
        ids_V: the teacher's id of each of the student's, Tensor of shape [student's entries], int64.
        outside: what becomes of the rest of the teacher's distribution, one of ``OUTSIDE``: it is
            left out; or a token counts by the mass of the kept entries, less where the rest is large.
    """

    ids_V: Tensor
    outside: str = "renormalise"
    _there: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Tensor:
        """The ids on a device, brought there once."""
        if device not in self._there:
            self._there[device] = self.ids_V.to(device)
        return self._there[device]

    def __post_init__(self) -> None:
        """Refuses an unknown choice."""
        if self.outside not in OUTSIDE:
            raise ValueError(
                f"outside: expected one of {', '.join(OUTSIDE)}, found {self.outside!r}"
            )


Entries = int | KeptEntries | None
"""What a teacher's and a student's vocabularies share: the first entries, those that were kept, or all."""


def fits(entries: Entries, ours: int, theirs: int) -> bool:
    """Whether a student and a teacher with so many entries can be compared."""
    if isinstance(entries, KeptEntries):
        return len(entries.ids_V) == ours and int(entries.ids_V.max()) < theirs
    return ours == theirs or entries is not None


def read_by_teacher(entries: Entries, tokens: Tensor) -> Tensor:
    """The teacher's ids of the student's tokens."""
    if not isinstance(entries, KeptEntries):
        return tokens
    return entries.on(tokens.device)[tokens]


def shared(entries: Entries, teacher: Projection, temperature: float = 1.0) -> Projection:
    """The teacher over the entries that its student has, without gradients.

    Args:
        entries: which these are.
        teacher: its hidden states and whole head.
        temperature: of the divergence, at which the mass of ``tail`` is measured.
    """
    if not isinstance(entries, KeptEntries):
        return teacher.counted(entries)
    head_VH = teacher.head_VH
    with torch.no_grad():
        kept = replace(teacher, head_VH=head_VH.index_select(0, entries.on(head_VH.device)))
        if entries.outside == "renormalise":
            return kept
        rows = chunk_rows(len(teacher.hidden_TH), len(head_VH), head_VH.device, 2)
        return replace(kept, mass_T=_mass(kept, teacher, temperature, rows))


def _mass(kept: Projection, teacher: Projection, temperature: float, rows: int) -> Tensor:
    """Share of the teacher's distribution that the kept entries have, Tensor of shape [tokens]."""
    mass_T = kept.hidden_TH.new_zeros(len(kept.hidden_TH), dtype=torch.float32)
    for start in range(0, len(mass_T), rows):
        part = slice(start, start + rows)
        logs = [
            torch.logsumexp(model[part].logits() / temperature, -1) for model in (kept, teacher)
        ]
        mass_T[part] = (logs[0] - logs[1]).exp()
    return mass_T
