"""A training in phases: batches of one length and one text after those of another, in one training.

Which phase a step is of follows from its number alone, so that a resumed training needs no state.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nemo_minitron.training.sampler import Place, as_samples, kept_batches


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        steps: how many it takes.
        samples: its packed samples; phases that read the same hold the same object, and one goes on
            where the other has ended.
        rate: factor of the learning rate.
    """

    steps: int
    samples: Any
    rate: float = 1.0


class PhasedSamples(torch.utils.data.Dataset[Tensor]):
    """The samples of all phases, one after the other; a batch holds those of one phase alone.

    Attributes:
        phases: in order.
        positions: of the longest samples.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = list(phases)
        self._ends = list(itertools.accumulate(phase.steps for phase in phases))
        self._pools: list[Any] = []
        for phase in phases:
            if not any(phase.samples is pool for pool in self._pools):
                self._pools.append(phase.samples)
        self._sets = [as_samples(pool) for pool in self._pools]
        self._firsts = [0, *itertools.accumulate(len(each) for each in self._sets)]
        self.positions = max(each.positions for each in self._sets)

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Any:
        pool = bisect.bisect_right(self._firsts, index) - 1
        return self._sets[pool][index - self._firsts[pool]]

    def lengths(self) -> list[int]:
        """Positions of each phase's samples."""
        return [self._sets[self._pool(number)].positions for number in range(len(self.phases))]

    def place(self, batch: int, per_step: int) -> Place:
        """Where the samples of a batch lie.

        Args:
            batch: its number, in the order that leaves none out.
            per_step: batches of a step.
        """
        phase = self._phase(batch // per_step)
        pool, first = self._pool(phase), self._ends[phase] - self.phases[phase].steps
        before = sum(
            self.phases[number].steps for number in range(phase) if self._pool(number) == pool
        )
        number = batch - (first - before) * per_step
        return Place(number, self._firsts[pool], len(self._sets[pool]))

    def steps_of(self, step: int, skipped: frozenset[int] = frozenset()) -> list[int]:
        """How many of a training's first steps are of each phase; ``skipped`` ones are not counted."""
        counts, left = [], step
        for number, phase in enumerate(self.phases):
            end = self._ends[number]
            own = phase.steps - sum(end - phase.steps <= each < end for each in skipped)
            last = number + 1 == len(self.phases)
            counts.append(left if last else min(own, left))
            left -= counts[-1]
        return counts

    def rate(self, step: int, skipped: frozenset[int] = frozenset()) -> float:
        """Factor of the learning rate at a step."""
        (source,) = kept_batches(step, step + 1, skipped)
        return self.phases[self._phase(source)].rate

    def _phase(self, step: int) -> int:
        return min(bisect.bisect_right(self._ends, step), len(self._ends) - 1)

    def _pool(self, phase: int) -> int:
        samples = self.phases[phase].samples
        return next(number for number, pool in enumerate(self._pools) if pool is samples)


class PhaseRates(Callback):
    """Takes every step with its phase's learning rate; the schedule itself knows nothing of phases.

    Attributes:
        samples: the training's samples.
        skipped: steps whose samples are left out.
    """

    def __init__(self, samples: PhasedSamples, skipped: frozenset[int]) -> None:
        self.samples, self.skipped = samples, skipped

    def factor(self, step: int) -> float:
        """Factor of the learning rate at a step."""
        return self.samples.rate(step, self.skipped)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Changes the rates for the time of each step of the optimiser, and back."""
        for optimizer in trainer.optimizers:
            scheduled: list[float] = []

            def before(given: Any, *_: Any, rates: list[float] = scheduled) -> None:
                factor = self.factor(trainer.global_step)
                rates[:] = [group["lr"] for group in given.param_groups]
                for group in given.param_groups if factor != 1 else []:
                    group["lr"] = group["lr"] * factor

            def behind(given: Any, *_: Any, rates: list[float] = scheduled) -> None:
                for group, rate in zip(given.param_groups, rates, strict=True):
                    group["lr"] = rate

            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(behind)


def phase_rates(samples: Any, skipped: frozenset[int]) -> list[Callback]:
    """What takes the steps of a training with its phases' rates; nothing where it has no phases."""
    return [PhaseRates(samples, skipped)] if isinstance(samples, PhasedSamples) else []


def learning_rate(trainer: Trainer) -> float:
    """The learning rate of the next step."""
    rate: float = trainer.optimizers[0].param_groups[0]["lr"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PhaseRates):
            rate = rate * callback.factor(trainer.global_step)
    return rate
