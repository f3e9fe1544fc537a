"""Tasks that the model is measured on while it trains: a callback beside the validation."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

Measure = Callable[[Any, str], dict[str, float]]
"""From a Hugging Face model and a task to its measures, named TASK:METRIC."""


class TaskCurves(Callback):
    """Measures tasks on the live model at the end of every so many validations, and logs them.

    The training continues as if nothing had been measured: what a measurement draws, it draws apart.
    The ranks share the tasks.

    Attributes:
        measure: measures a task.
        tasks: their names.
        every: validations from one measurement to the next.
        measured: what the validation has measured; empty where it was not its turn.
    """

    def __init__(self, measure: Measure, tasks: Sequence[str], every: int) -> None:
        self.measure, self.tasks, self.every = measure, list(tasks), every
        self.measured: dict[str, float] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what the validation before has measured."""
        self.measured = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, where it is the turn; an average of the weights stands in their place by now."""
        if trainer.sanity_checking or _number(trainer) % self.every:
            return
        own: dict[str, float] = {}
        with _apart(trainer.strategy.root_device), _as_stored(trainer, pl_module) as model:
            for task in self.tasks[trainer.global_rank :: trainer.world_size]:
                own |= self.measure(model, task)
        self.measured = _gathered(own, trainer)
        for name, value in self.measured.items():
            pl_module.log(name, value, rank_zero_only=False)


def judge_when_measured(trainer: Trainer) -> None:
    """Lets early stopping on a task look only where that was measured: its patience counts measurements."""
    curves = [each for each in trainer.callbacks if isinstance(each, TaskCurves)]  # type: ignore[attr-defined]
    for callback in trainer.callbacks if curves else []:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and ":" in callback.monitor:
            callback.on_validation_end = _only_with(  # type: ignore[method-assign]
                curves[0], callback.monitor, callback.on_validation_end
            )


def _only_with(curves: TaskCurves, name: str, judge: Callable[..., None]) -> Callable[..., None]:
    def on_validation_end(trainer: Trainer, pl_module: LightningModule) -> None:
        if name in curves.measured:
            judge(trainer, pl_module)

    return on_validation_end


def validated(trainer: Trainer) -> dict[str, float]:
    """Everything that a validation has measured, by name."""
    names = [name for name in ("val_loss", "val_divergence") if name in trainer.callback_metrics]
    values = {name: float(trainer.callback_metrics[name]) for name in names}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TaskCurves):
            values |= callback.measured
    return values


def _number(trainer: Trainer) -> int:
    """How many validations there were with this one; a resumed training counts as one that never stopped."""
    between = trainer.val_check_batch
    if not isinstance(between, int) or between < 1:
        return 0
    return trainer.global_step * trainer.accumulate_grad_batches // between


def _gathered(own: dict[str, float], trainer: Trainer) -> dict[str, float]:
    if trainer.world_size == 1:
        return own
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Leaves the state of all random numbers as it was, those of a GPU among them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _as_stored(trainer: Trainer, pl_module: Any) -> Iterator[Any]:
    """The Hugging Face model with its own layers, not compiled: a task's batches have any shape."""
    mixed = str(trainer.precision).endswith("-mixed")
    precision = trainer.precision_plugin.forward_context() if mixed else contextlib.nullcontext()
    stance: Any = torch.compiler.set_stance("force_eager")
    with pl_module.own_layers(), stance, precision:
        yield pl_module.model
