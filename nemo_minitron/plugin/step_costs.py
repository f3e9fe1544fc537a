"""What a step of a training computes, for its log."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from nemo_minitron.families import Architecture, Family
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.training.phases import PhasedSamples, PhaseRates


def step_flops(trainer: Trainer, model: MinitronModel, positions: int) -> int:
    """FLOPs per token of a step: the model's forward and backward pass, and its teacher's forward pass."""
    flops = 3 * forward_flops(model.model, model.family, positions)
    for callback in trainer.callbacks:
        if isinstance(callback, KnowledgeDistillation):
            flops += forward_flops(callback.teacher, callback.family, positions)
    return flops


def work_of_phases(
    trainer: Trainer, model: MinitronModel, samples: PhasedSamples, per_step: int
) -> Callable[[int], tuple[int, int]]:
    """Tokens and FLOPs of the first steps of a training in phases."""
    (rates,) = (each for each in trainer.callbacks if isinstance(each, PhaseRates))
    lengths = samples.lengths()
    costs = [step_flops(trainer, model, positions) for positions in lengths]

    def done(step: int) -> tuple[int, int]:
        counts = samples.steps_of(step, rates.skipped)
        tokens = [per_step * n * each for n, each in zip(counts, lengths, strict=True)]
        return sum(tokens), sum(n * cost for n, cost in zip(tokens, costs, strict=True))

    return done


def forward_flops(model: Any, family: Family, positions: int) -> int:
    """FLOPs per token of a forward pass over samples of so many positions."""
    return model_size(Architecture(family, model.config.to_dict()), positions).flops_per_token
