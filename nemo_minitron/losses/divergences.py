"""Divergences between a teacher's and a student's distribution over the vocabulary, one number per token.

p is the teacher's softmax(x / tau), q the student's ([P1] eq. 5). Those that soften by tau carry
the factor tau squared, which keeps the scale of their gradient independent of tau. The caller masks
tokens and takes means.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.losses.sparse_targets import known_entries, sparse_divergence
from nemo_minitron.losses.wide_matmul import wide


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and its parameters.

    Attributes:
        name: a key of ``DIVERGENCES``.
        temperature: tau > 0; ``mse`` and ``cosine`` compare logits and know none.
        beta: of ``jsd``, between 0 and 1; 0.5 is the Jensen-Shannon divergence.
        top_k: of ``topk_kl``, entries of the teacher that are kept apart; all others are one.
    """

    name: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int = 100

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: an unknown name or a parameter out of range.
        """
        if self.name not in DIVERGENCES:
            raise ValueError(
                f"divergence: expected one of {', '.join(DIVERGENCES)}, found {self.name!r}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, found {self.temperature}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: expected a number between 0 and 1, found {self.beta}")
        if self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, found {self.top_k}")

    def __call__(self, teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
        """Divergence of every token.

        Args:
            teacher_TV: teacher logits, Tensor of shape [tokens, vocabulary].
            student_TV: student logits, same shape; gradients flow to them.

        Returns:
            Tensor of shape [tokens], float32 (float64 for float64 logits).
        """
        return DIVERGENCES[self.name](wide(teacher_TV), wide(student_TV), self)


def forward_kl(teacher_TV: Tensor, student_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) x tau^2: the student must put mass wherever the teacher does.

    [tokens, vocabulary] to [tokens].
    """
    log_p_TV, log_q_TV = _logs(teacher_TV, student_TV, temperature)
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1) * temperature**2


def reverse_kl(teacher_TV: Tensor, student_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) x tau^2: the student must put mass nowhere that the teacher does not."""
    log_p_TV, log_q_TV = _logs(teacher_TV, student_TV, temperature)
    return (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1) * temperature**2


def jsd(
    teacher_TV: Tensor, student_TV: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Generalised Jensen-Shannon divergence x tau^2 (arXiv 2306.13649 eq. 1).

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    """
    log_p_TV, log_q_TV = _logs(teacher_TV, student_TV, temperature)
    weights = torch.tensor([beta, 1 - beta], dtype=log_p_TV.dtype, device=log_p_TV.device).log()
    log_m_TV = torch.logaddexp(log_p_TV + weights[0], log_q_TV + weights[1])
    of_p_T = (log_p_TV.exp() * (log_p_TV - log_m_TV)).sum(-1)
    of_q_T = (log_q_TV.exp() * (log_q_TV - log_m_TV)).sum(-1)
    return (beta * of_p_T + (1 - beta) * of_q_T) * temperature**2


def topk_kl(teacher_TV: Tensor, student_TV: Tensor, top_k: int, temperature: float = 1.0) -> Tensor:
    """KL over the teacher's top k entries and one bucket with the mass of all others, x tau^2.

    Without the bucket (renormalised inside the top k) moving mass to the tail would cost the
    student nothing.
    """
    return sparse_divergence(
        known_entries(teacher_TV, "top_k", top_k, temperature), student_TV, temperature
    )


def mse(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    """Mean over the vocabulary of the squared difference of logits."""
    return (teacher_TV - student_TV).square().mean(-1)


def cosine(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    """1 - cosine of the angle between the logits."""
    return 1 - torch.nn.functional.cosine_similarity(teacher_TV, student_TV, dim=-1)


def _logs(teacher_TV: Tensor, student_TV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    pair = (wide(logits_TV) / temperature for logits_TV in (teacher_TV, student_TV))
    log_p_TV, log_q_TV = (torch.log_softmax(logits_TV, -1) for logits_TV in pair)
    return log_p_TV, log_q_TV


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Divergence], Tensor]] = {
    "forward_kl": lambda t, s, d: forward_kl(t, s, d.temperature),
    "reverse_kl": lambda t, s, d: reverse_kl(t, s, d.temperature),
    "jsd": lambda t, s, d: jsd(t, s, d.beta, d.temperature),
    "topk_kl": lambda t, s, d: topk_kl(t, s, d.top_k, d.temperature),
    "mse": lambda t, s, d: mse(t, s),
    "cosine": lambda t, s, d: cosine(t, s),
}
