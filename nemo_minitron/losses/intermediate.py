"""Losses between what lies inside teacher and student ([P1] section 3.2), one number per token.

L_is = L_emb + L_o + L_i + L_att: embedding output, output of a layer, input of its MLP, and the
relations between queries, keys and values. A linear layer that is shared by the first three lifts
the student's width to the teacher's; relations need none, they have no width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_minitron.losses.wide_matmul import wide

TERMS = ("embedding", "hidden", "mlp_input", "attention")
DISTANCES = ("cosine", "mse")
_LEAST = 1e-4


@dataclass(frozen=True)
class IntermediateWeights:
    """Which intermediate losses, and how.

    Attributes:
        terms: some of ``TERMS``.
        distance: between hidden states, one of ``DISTANCES``.
        layers: pairs (teacher layer, student layer), 0-based; negative ones count from the end.
        relation_heads: R, heads into which queries, keys and values are split for their relations.
        alpha: weight of L_is beside the loss on logits; None: L_logits / L_is of every step.
    """

    terms: tuple[str, ...]
    distance: str = "cosine"
    layers: tuple[tuple[int, int], ...] = ((-3, -3),)
    relation_heads: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: an unknown term or distance, or nothing to compare.
        """
        unknown = [term for term in self.terms if term not in TERMS]
        if unknown or not self.terms:
            raise ValueError(
                f"terms: expected some of {', '.join(TERMS)}, found {unknown or self.terms}"
            )
        if self.distance not in DISTANCES:
            raise ValueError(
                f"distance: expected one of {', '.join(DISTANCES)}, found {self.distance!r}"
            )
        if not self.layers:
            raise ValueError("layers: expected teacher:student pairs, found none")
        if self.alpha is not None and self.alpha < 0:
            raise ValueError(f"alpha: expected a number of at least 0, found {self.alpha}")


def state_distance(teacher_TG: Tensor, student_TG: Tensor, distance: str = "cosine") -> Tensor:
    """Distance between hidden states.

    Args:
        teacher_TG: the teacher's, Tensor of shape [tokens, hidden]; ``student_TG``: the student's,
            lifted to the same width.
        student_TG: see there; gradients flow to it.
        distance: ``cosine``, 1 - cos(teacher, student); ``mse``, the mean over channels of the
            squared difference.

    Returns:
        Tensor of shape [tokens], float32 (float64 for float64 states).
    """
    teacher_TG, student_TG = wide(teacher_TG), wide(student_TG)
    if distance == "cosine":
        return 1 - torch.cosine_similarity(teacher_TG, student_TG, dim=-1)
    return (teacher_TG - student_TG).square().mean(-1)


def relation_divergence(teacher_BSU: Tensor, student_BSU: Tensor, relation_heads: int) -> Tensor:
    """Divergence between the relations of queries with queries (or keys, or values) (MiniLMv2, eq. 4 to 6).

    The channels of all heads are split again into R relation heads of d channels; the relation of a
    position is softmax(x x^T / sqrt(d)) over the positions up to it, for a decoder's token sees no
    later one. The result is KL(teacher, student), the mean over relation heads. Teacher and student
    may have other widths and other numbers of heads. One sample's relations exist at a time, in the
    backward pass too.

    Args:
        teacher_BSU: Tensor of shape [samples, positions, teacher channels].
        student_BSU: Tensor of shape [samples, positions, student channels]; gradients flow to it.
        relation_heads: R; divides both widths.

    Returns:
        Tensor of shape [samples, positions], float32 (float64 for float64 input).

    Raises:
        ValueError: R does not divide a width.
    """
    for name, x_BSU in (("teacher", teacher_BSU), ("student", student_BSU)):
        if x_BSU.shape[-1] % relation_heads:
            raise ValueError(
                f"relation_heads: {relation_heads} does not divide the {name}'s {x_BSU.shape[-1]} channels "
                "of queries, keys or values"
            )
    pairs = zip(wide(teacher_BSU), wide(student_BSU), strict=True)
    rows = [
        checkpoint(_relations, t_SU, s_SU, relation_heads, use_reentrant=False)
        for t_SU, s_SU in pairs
    ]
    return torch.stack(rows)


def _relations(teacher_SU: Tensor, student_SU: Tensor, heads: int) -> Tensor:
    # autocast would round the products to eight bits, and near relations differ in less
    with torch.autocast(student_SU.device.type, enabled=False):
        log_p_RSS, log_q_RSS = _log_relation(teacher_SU, heads), _log_relation(student_SU, heads)
    # above the diagonal both are -inf, and there is nothing to compare
    later_SS = torch.ones(log_p_RSS.shape[1:], dtype=torch.bool, device=log_p_RSS.device).triu(1)
    difference_RSS = (log_p_RSS - log_q_RSS).masked_fill(later_SS, 0)
    return (log_p_RSS.exp() * difference_RSS).sum(-1).mean(0)


def _log_relation(x_SU: Tensor, heads: int) -> Tensor:
    x_RSD = x_SU.unflatten(-1, (heads, -1)).transpose(0, 1)
    product_RSS = x_RSD @ x_RSD.transpose(1, 2) / x_RSD.shape[-1] ** 0.5
    later_SS = torch.ones(product_RSS.shape[1:], dtype=torch.bool, device=x_SU.device).triu(1)
    # finite, for the gradient of -inf - -inf would be NaN
    return torch.log_softmax(product_RSS.masked_fill(later_SS, torch.finfo(x_SU.dtype).min), -1)


def balance(logits_loss: Tensor, intermediate: Tensor) -> Tensor:
    """Alpha = L_logits / L_is, detached ([P1] section 3.2).

    It depends on the step alone: a resumed training needs no memory of it.

    Args:
        logits_loss: the loss on logits (and labels), scalar; where there are several ranks, their
            mean.
        intermediate: L_is, scalar; likewise.
    """
    # where the states agree to four digits already, their weight grows no more
    return (logits_loss / intermediate.clamp_min(_LEAST)).detach()
