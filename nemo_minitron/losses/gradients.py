"""Value and gradient of every divergence at once, by hand.

Autograd would keep several tensors of the logits' size.

With z the student's logits over the temperature t and q their softmax, p the teacher's, a divergence is
t^2 D(p, q), and its gradient by the student's logits is t dD/dz. That of any D that is written in q is

    dD/dz_j = q_j (g_j - sum_i q_i g_i)    with g_j = dD/dq_j.

The textbook formulas stand in ``divergences.py`` and ``sparse_targets.py``; values and gradients here are
checked against autograd of them in float64 (tests/losses/test_gradients.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.sparse_targets import SparseTargets, known_entries, sparse_divergence


class ValueAndGradient(NamedTuple):
    """What a divergence finds in some tokens.

    Attributes:
        value_N1: the divergence of each, [tokens, 1].
        grad_NV: its gradient by the student's logits, Tensor of shape [tokens, vocabulary].
        log_sum_N1: logarithm of the sum of e^((x - max) / t) over the student's logits x; None: the
            divergence compares logits and has no use for it.
    """

    value_N1: Tensor
    grad_NV: Tensor
    log_sum_N1: Tensor | None = None


def value_alone(
    divergence: Divergence, teacher: Tensor | SparseTargets, student_NV: Tensor
) -> Tensor:
    """A divergence alone, Tensor of shape [tokens, 1]; arguments as in ``value_and_gradient``."""
    if isinstance(teacher, SparseTargets):
        return sparse_divergence(teacher, student_NV, divergence.temperature)[:, None]
    return divergence(teacher, student_NV)[:, None]


def value_and_gradient(
    divergence: Divergence, teacher: Tensor | SparseTargets, student_NV: Tensor
) -> ValueAndGradient:
    """A divergence and its gradient, token by token.

    Args:
        divergence: which.
        teacher: the teacher's logits, [tokens, vocabulary], or what is known of them.
        student_NV: the student's, likewise; they stay as they are.
    """
    if isinstance(teacher, SparseTargets):
        return _of_known_entries(teacher, student_NV, divergence.temperature)
    return _BY_NAME[divergence.name](teacher, student_NV, divergence)


def _forward_kl(teacher_NV: Tensor, student_NV: Tensor, divergence: Divergence) -> ValueAndGradient:
    """KL(p || q): dD/dz = q - p."""
    log_p_NV, log_q_NV, log_sum_N1 = _logs(teacher_NV, student_NV, divergence.temperature)
    p_NV = log_p_NV.exp()
    value_N1 = (p_NV * (log_p_NV - log_q_NV)).sum(-1, keepdim=True)
    return _scaled(value_N1, log_q_NV.exp_().sub_(p_NV), log_sum_N1, divergence.temperature)


def _reverse_kl(teacher_NV: Tensor, student_NV: Tensor, divergence: Divergence) -> ValueAndGradient:
    """KL(q || p): g = log(q / p) + 1."""
    log_p_NV, log_q_NV, log_sum_N1 = _logs(teacher_NV, student_NV, divergence.temperature)
    gap_NV, q_NV = log_q_NV - log_p_NV, log_q_NV.exp()
    value_N1 = (q_NV * gap_NV).sum(-1, keepdim=True)
    return _scaled(value_N1, gap_NV.sub_(value_N1).mul_(q_NV), log_sum_N1, divergence.temperature)


def _jsd(teacher_NV: Tensor, student_NV: Tensor, divergence: Divergence) -> ValueAndGradient:
    """Beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: g = (1 - beta) log(q / m)."""
    log_p_NV, log_q_NV, log_sum_N1 = _logs(teacher_NV, student_NV, divergence.temperature)
    beta, p_NV, q_NV = divergence.beta, log_p_NV.exp(), log_q_NV.exp()
    log_m_NV = _log_mixture(log_p_NV, log_q_NV, p_NV, q_NV, beta)
    of_p_N1 = (p_NV * log_p_NV.sub_(log_m_NV)).sum(-1, keepdim=True)
    gap_NV = log_q_NV.sub_(log_m_NV)
    of_q_N1 = (q_NV * gap_NV).sum(-1, keepdim=True)
    value_N1 = beta * of_p_N1 + (1 - beta) * of_q_N1
    grad_NV = gap_NV.sub_(of_q_N1).mul_(q_NV).mul_(1 - beta)
    return _scaled(value_N1, grad_NV, log_sum_N1, divergence.temperature)


def _log_mixture(
    log_p_NV: Tensor, log_q_NV: Tensor, p_NV: Tensor, q_NV: Tensor, beta: float
) -> Tensor:
    """Log(beta p + (1 - beta) q), also where both are so small that they round to 0."""
    mixture_NV = (beta * p_NV).add_(q_NV, alpha=1 - beta)
    least = torch.finfo(mixture_NV.dtype).tiny
    # where both round to 0 they multiply what is taken of it, which only has to be finite
    larger_NV = torch.maximum(log_p_NV, log_q_NV)
    return torch.where(mixture_NV > least, mixture_NV.clamp_min(least).log(), larger_NV)


def _mse(teacher_NV: Tensor, student_NV: Tensor, _: Divergence) -> ValueAndGradient:
    """Mean over V entries of (x - y)^2: 2 (x - y) / V."""
    gap_NV = student_NV - teacher_NV
    return ValueAndGradient(
        gap_NV.square().mean(-1, keepdim=True), gap_NV.mul_(2 / gap_NV.shape[-1])
    )


def _cosine(teacher_NV: Tensor, student_NV: Tensor, _: Divergence) -> ValueAndGradient:
    """1 - cos: -(y / |y| - cos x / |x|) / |x|; a length below 1e-8 counts as that, as torch has it."""
    x_N1, y_N1 = (values.norm(dim=-1, keepdim=True) for values in (student_NV, teacher_NV))
    least_x_N1, least_y_N1 = x_N1.clamp_min(1e-8), y_N1.clamp_min(1e-8)
    cos_N1 = (student_NV * teacher_NV).sum(-1, keepdim=True) / (least_x_N1 * least_y_N1)
    by_own_N1 = torch.where(x_N1 > 1e-8, cos_N1 / least_x_N1.square(), 0)
    return ValueAndGradient(
        1 - cos_N1, student_NV * by_own_N1 - teacher_NV / (least_x_N1 * least_y_N1)
    )


def _of_known_entries(targets: SparseTargets, student_NV: Tensor, tau: float) -> ValueAndGradient:
    """From what is known of the teacher.

    Of drawn entries: the mean of -log q, whose gradient is q - their frequency. Of the largest, with P
    and Q the masses that both models have outside of them: q_k - p_k for an entry k that is known, and
    q_j (1 - P / Q) for every other.
    """
    ids_NK, log_q_NV = targets.ids_TK, _log_softmax(student_NV, tau)
    log_q_NK, log_sum_N1 = log_q_NV.gather(-1, ids_NK), _log_sum(log_q_NV)
    entries = ids_NK.shape[-1]
    if targets.log_p_TK is None:
        value_N1 = -log_q_NK.mean(-1, keepdim=True)
        # counts are exact, a frequency is not, and would be taken away once for each draw
        grad_NV = log_q_NV.exp_().mul_(entries).scatter_add_(-1, ids_NK, -torch.ones_like(log_q_NK))
        return ValueAndGradient(value_N1 * tau**2, grad_NV.mul_(tau / entries), log_sum_N1)
    assert targets.log_tail_T is not None
    log_p_NK = targets.log_p_TK.to(log_q_NK.dtype)
    value_N1 = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1, keepdim=True)
    grad_NK = log_q_NK.exp_().sub_(log_p_NK.exp())
    if entries == log_q_NV.shape[-1]:  # there is no other
        return _scaled(value_N1, log_q_NV.scatter_(-1, ids_NK, grad_NK), log_sum_N1, tau)
    # the others' mass is added up, not 1 - the rest: near 0 that has no digits
    others_NV = log_q_NV.scatter_(-1, ids_NK, -torch.inf)
    tail_q_N1 = others_NV.logsumexp(-1, keepdim=True)
    tail_p_N1 = targets.log_tail_T[:, None].to(log_q_NK.dtype)
    value_N1 = value_N1 + tail_p_N1.exp() * (tail_p_N1 - tail_q_N1)
    grad_NV = others_NV.sub_(tail_q_N1).exp_().mul_(tail_q_N1.exp() - tail_p_N1.exp())
    return _scaled(value_N1, grad_NV.scatter_(-1, ids_NK, grad_NK), log_sum_N1, tau)


def _topk_kl(teacher_NV: Tensor, student_NV: Tensor, divergence: Divergence) -> ValueAndGradient:
    known = known_entries(teacher_NV, "top_k", divergence.top_k, divergence.temperature)
    return _of_known_entries(known, student_NV, divergence.temperature)


_BY_NAME: dict[str, Callable[[Tensor, Tensor, Divergence], ValueAndGradient]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "topk_kl": _topk_kl,
    "mse": _mse,
    "cosine": _cosine,
}


def _logs(teacher_NV: Tensor, student_NV: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log p, log q (made alike, so that equal models do not diverge), and the logarithm of q's normaliser."""
    log_q_NV = _log_softmax(student_NV, tau)
    return _log_softmax(teacher_NV, tau), log_q_NV, _log_sum(log_q_NV)


def _log_softmax(logits_NV: Tensor, tau: float) -> Tensor:
    return torch.log_softmax(logits_NV if tau == 1 else logits_NV / tau, -1)


def _log_sum(log_q_NV: Tensor) -> Tensor:
    """Of the largest logit, which has been shifted to 0, that is what its logarithm lacks."""
    return -log_q_NV.amax(-1, keepdim=True)


def _scaled(value_N1: Tensor, grad_NV: Tensor, log_sum_N1: Tensor, tau: float) -> ValueAndGradient:
    """With the factors of the temperature."""
    return ValueAndGradient(value_N1 * tau**2, grad_NV.mul_(tau), log_sum_N1)
