"""Intermediate losses of a distillation, and the projection that is learned with them."""

from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.families import Architecture, Family
from nemo_minitron.losses.intermediate import (
    IntermediateWeights,
    relation_divergence,
    state_distance,
)
from nemo_minitron.models.captures import Captures


class IntermediateLoss:
    """L_is between teacher and student ([P1] section 3.2).

    Attributes:
        weights: terms, distance, layers.
    """

    def __init__(
        self,
        weights: IntermediateWeights,
        teacher: tuple[Any, Family],
        student: tuple[Any, Family],
        pl_module: Any,
        kept_H: Tensor | None = None,
    ) -> None:
        """Hooks both models and gives the student's module its ``projection``.

        Args:
            weights: what is compared.
            teacher: the teacher and its family.
            student: the student and its family.
            pl_module: the student's module.
            kept_H: the teacher's channel that each channel of the student was, where it was pruned
                from it: with them the projection begins; None: with random weights.

        Raises:
            ValueError: a layer that is not there or has no attention, or widths that cannot be
                compared.
        """
        self.weights, self._pl_module = weights, pl_module
        theirs, ours = zip(*weights.layers, strict=True)
        models = [
            Architecture(family, model.config.to_dict()) for model, family in (teacher, student)
        ]
        self._teacher = Captures(teacher[0], models[0], weights.terms, theirs)
        self._student = Captures(student[0], models[1], weights.terms, ours)
        resolve = (self._teacher.resolve, self._student.resolve)
        self._pairs = [(resolve[0](one), resolve[1](other)) for one, other in weights.layers]
        widths = models[0].sizes["hidden"], models[1].sizes["hidden"]
        if widths[0] != widths[1] and set(weights.terms) != {"attention"}:
            pl_module.projection = _projection(widths, kept_H, next(student[0].parameters()))

    @staticmethod
    def release(pl_module: nn.Module) -> None:
        """Removes the projection, so that no archive of the model holds it."""
        if hasattr(pl_module, "projection"):
            del pl_module.projection

    def __call__(self, valid_T: Tensor) -> Tensor:
        """L_is of the last forward passes of both models.

        The mean over valid tokens and pairs of layers, summed over the terms: a scalar.

        Args:
            valid_T: tokens that count, Tensor of shape [tokens].
        """
        # what a teacher under inference mode leaves cannot be saved for a backward pass, its copy
        # can; and the teacher may be elsewhere
        theirs = {
            place: state.to(valid_T.device, copy=True)
            for place, state in self._teacher.take().items()
        }
        ours = self._student.take()
        total = torch.zeros((), device=valid_T.device)
        for term in self.weights.terms:
            pairs = [(0, 0)] if term == "embedding" else self._pairs
            losses = [_mean(self._compare(term, theirs, ours, *pair), valid_T) for pair in pairs]
            total = total + torch.stack(losses).mean()
        return total

    def _compare(self, term: str, theirs: Any, ours: Any, their: int, our: int) -> Tensor:
        """One number per token."""
        if term != "attention":
            student_TH = ours[term, our, 0].flatten(0, -2)
            lifted = getattr(self._pl_module, "projection", None)
            student_TG = student_TH if lifted is None else lifted(student_TH)
            return state_distance(
                theirs[term, their, 0].flatten(0, -2), student_TG, self.weights.distance
            )
        numbers = [place[2] for place in theirs if place[:2] == (term, their)]
        found = [
            relation_divergence(
                theirs[term, their, n], ours[term, our, n], self.weights.relation_heads
            )
            for n in numbers
        ]
        return torch.stack(found).mean(0).flatten()


def _mean(loss_T: Tensor, valid_T: Tensor) -> Tensor:
    if loss_T.device.type == "cpu":
        return loss_T[valid_T].sum() / valid_T.sum().clamp_min(1)
    # an accelerator would tell the host first how many these are
    return torch.where(valid_T, loss_T, 0).sum() / valid_T.sum().clamp_min(1)


def _projection(widths: tuple[int, int], kept_H: Tensor | None, like: Tensor) -> nn.Linear:
    """The linear layer from the student's width to the teacher's."""
    projection = nn.Linear(widths[1], widths[0], bias=False)
    with torch.no_grad():
        if kept_H is None:
            generator = torch.Generator().manual_seed(0)  # the same on every rank
            projection.weight.normal_(0, widths[1] ** -0.5, generator=generator)
        else:
            projection.weight.zero_()
            projection.weight[kept_H, torch.arange(widths[1])] = 1
    return projection.to(device=like.device, dtype=like.dtype)
