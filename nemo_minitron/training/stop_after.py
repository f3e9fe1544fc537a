"""A training that ends before its schedule does, and can resume from there."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.training.preemption import save_step

KEY = "distill.stop_after"
"""The key that says after how many steps."""


class StopAfter(Callback):
    """Saves and ends a training after a step, with a validation; rate and samples are those of all its steps.

    Attributes:
        folder: where checkpoints lie.
        step: after how many.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes no step where one was killed behind the last."""
        if trainer.global_step >= self.step:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between steps only."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step < self.step:
            return
        save_step(trainer, self.folder)
        trainer.should_stop = True
