"""Early stopping that ends a resumed training where it ends one that never stopped."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

_KEPT = "watched"
"""Entry of a checkpoint."""


class WatchedMetrics(Callback):
    """Keeps what early stopping goes by, where that is a metric of training.

    A validation that is made up for has no batch before it, and early stopping ends a training where its
    metric is not there.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts the values of this step into the checkpoint."""
        values = watched(trainer)
        if values:
            checkpoint[_KEPT] = values

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes them over."""
        self._values = checkpoint.get(_KEPT, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts them where they were."""
        values = {name: torch.tensor(value) for name, value in self._values.items()}
        trainer.callback_metrics.update(values)


def judge_again(trainer: Trainer, validations: Sequence[Mapping[str, Any]]) -> None:
    """Lets early stopping judge the validations of the log again where a training resumes.

    A step's checkpoint is written before its validation, and so holds early stopping without that
    verdict. Each follows from the log's numbers and those before them.

    Args:
        trainer: with its callbacks.
        validations: the log's lines of those that the checkpoint comes behind, in order.
    """
    for callback in _stopping(trainer):
        callback.load_state_dict = partial(  # type: ignore[method-assign]
            _load, trainer, callback, callback.load_state_dict, validations
        )


def _load(
    trainer: Trainer,
    callback: EarlyStopping,
    load: Callable[[dict[str, Any]], None],
    validations: Sequence[Mapping[str, Any]],
    state: dict[str, Any],
) -> None:
    if callback._check_on_train_epoch_end:  # it looks at epochs, which end before they are saved
        load(state)
        return
    fresh = callback.wait_count, callback.best_score
    load(state)
    callback.wait_count, callback.best_score = fresh
    for line in validations:
        if callback.monitor in line:
            stops, _ = callback._evaluate_stopping_criteria(torch.tensor(line[callback.monitor]))
            trainer.should_stop = trainer.should_stop or stops


def watched(trainer: Trainer) -> dict[str, float]:
    """What early stopping goes by at a validation, by name, but for tasks: not every one measures them."""
    names = [callback.monitor for callback in _stopping(trainer) if ":" not in callback.monitor]
    metrics = trainer.callback_metrics
    return {name: float(metrics[name]) for name in names if name in metrics}


def _stopping(trainer: Trainer) -> list[EarlyStopping]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
