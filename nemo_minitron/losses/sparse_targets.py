"""Divergence from a teacher of whom a few entries per token are known: the largest, or samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.losses.wide_matmul import wide

METHODS = ("top_k", "sampling")
_NOTHING = -60000.0
"""As low as float16 goes."""


@dataclass(frozen=True)
class SparseTargets:
    """What is known of a teacher's distributions.

    Attributes:
        ids_TK: vocabulary entries, Tensor of shape [tokens, entries], int64.
        log_p_TK: their log-probabilities at the temperature of the divergence, float32 (float64 of
            float64 logits): the teacher's largest entries, each once. None: entries drawn from the
            teacher's distribution, some of them more than once, each of which stands for 1/K.
        log_tail_T: with them, the logarithm of the mass of all others, Tensor of shape [tokens].
        mass_T: by which share each token counts, see ``Projection``.
    """

    ids_TK: Tensor
    log_p_TK: Tensor | None = None
    log_tail_T: Tensor | None = None
    mass_T: Tensor | None = None

    def __getitem__(self, index: slice | Tensor) -> "SparseTargets":
        """Those of some tokens."""
        parts = (self.log_p_TK, self.log_tail_T, self.mass_T)
        return SparseTargets(
            self.ids_TK[index], *(None if part is None else part[index] for part in parts)
        )

    def to(self, device: torch.device) -> "SparseTargets":
        """The same on a device."""
        parts = (self.log_p_TK, self.log_tail_T, self.mass_T)
        return SparseTargets(
            self.ids_TK.to(device), *(None if p is None else p.to(device) for p in parts)
        )


def sparse_divergence(
    targets: SparseTargets, student_TV: Tensor, temperature: float = 1.0
) -> Tensor:
    """Divergence of the student from what is known of the teacher, x tau^2.

    Of the largest entries: KL over them and one bucket with the mass of all others, as in
    ``topk_kl``. Of samples (arXiv 2503.16870): their mean negative log-likelihood, whose
    expectation is the cross-entropy of teacher and student, that is KL(p || q) + H(p): the gradient
    is an unbiased estimate of KL's.

    Args:
        targets: what is known.
        student_TV: logits, Tensor of shape [tokens, vocabulary]; gradients flow to them.
        temperature: tau.

    Returns:
        Tensor of shape [tokens].
    """
    log_q_TV = torch.log_softmax(wide(student_TV) / temperature, -1)
    log_q_TK = log_q_TV.gather(-1, targets.ids_TK)
    if targets.log_p_TK is None:
        return -log_q_TK.mean(-1) * temperature**2
    assert targets.log_tail_T is not None
    log_p_TK, tail_p_T = targets.log_p_TK.to(log_q_TK.dtype), targets.log_tail_T.to(log_q_TK.dtype)
    kept_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(-1)
    if log_p_TK.shape[-1] == log_q_TV.shape[-1]:
        return kept_T * temperature**2
    # the student's tail as a sum of what is left, not as 1 - the rest: near 0 that has no digits
    tail_q_T = torch.logsumexp(log_q_TV.scatter(-1, targets.ids_TK, -torch.inf), -1)
    return (kept_T + tail_p_T.exp() * (tail_p_T - tail_q_T)) * temperature**2


def known_entries(
    teacher_TV: Tensor,
    method: str,
    entries: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> SparseTargets:
    """What to keep of a teacher's logits.

    Args:
        teacher_TV: Tensor of shape [tokens, vocabulary].
        method: ``top_k``, or ``sampling`` with replacement.
        entries: K.
        temperature: tau.
        generator: of the draw.
    """
    log_p_TV = torch.log_softmax(wide(teacher_TV) / temperature, -1)
    if method == "top_k":
        log_p_TK, ids_TK = log_p_TV.topk(min(entries, log_p_TV.shape[-1]), dim=-1)
        tail_T = torch.logsumexp(log_p_TV.scatter_(-1, ids_TK, -torch.inf), -1)
        # finite where nothing is left: the product of mass and logarithm is then 0
        return SparseTargets(ids_TK, log_p_TK, tail_T.clamp_min(_NOTHING))
    return SparseTargets(
        torch.multinomial(log_p_TV.exp(), entries, replacement=True, generator=generator)
    )
