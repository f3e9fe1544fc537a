"""Lightning callbacks: distillation, model transforms, exact resume, a loss guard, the training log."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from nemo_minitron.artifacts.log import read_log
from nemo_minitron.core.losses import LossTerms

try:  # NeMo 2.x has its own; it calls pl_module.model_transform(trainer.model) and ignores what comes back
    from nemo.lightning.pytorch.callbacks import ModelTransform
except ImportError:

    class ModelTransform(Callback):  # type: ignore[no-redef]
        """Applies ``pl_module.model_transform`` once, before the optimiser is made.

        The transform may change the module in place, return another one, or both.
        """

        def __init__(self) -> None:
            self.applied = False

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            """Applies the transform to the module's ``model``."""
            transform: Callable[[nn.Module], nn.Module] | None = getattr(pl_module, "model_transform", None)
            if transform is None or self.applied:
                return
            self.applied = True
            result = transform(pl_module.model)
            if result is not None:
                pl_module.model = result


class ExactResume(Callback):
    """Makes a checkpoint that was written after a batch's step resume behind that batch.

    Lightning 2.4 writes such checkpoints before it counts the batch as completed, and counts from the
    completed ones on
    resuming: one batch is lost from the accumulation of gradients and from the rhythm of validation.
    """

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts every batch that has been processed as completed."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts["completed"] = counts["processed"]


class LossGuard(Callback):
    """Stops the training at a loss or gradient that is not finite, before it reaches the weights."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the loss of every micro-batch.

        Raises:
            FloatingPointError: it is NaN or infinite.
        """
        self._refuse(trainer, "loss", float(pl_module.last_terms.loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Looks at the gradients of a step (float16 training may see infinity and copes by itself).

        Raises:
            FloatingPointError: their norm is NaN or infinite.
        """
        if trainer.precision in ("16-mixed", "16-true"):
            return
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self._refuse(trainer, "gradient", float(torch.nn.utils.get_total_norm(gradients)))

    def _refuse(self, trainer: Trainer, what: str, value: float) -> None:
        if not math.isfinite(value):
            step = trainer.global_step + 1
            raise FloatingPointError(f"step {step}: the {what} is {value}; the last checkpoint is good")


class TrainingLog(Callback):
    """Appends one JSON line per logged step to a file, also across resumed runs.

    Attributes:
        path: the file.
        every: steps between lines; step 1 and validations are always logged.
        tokens_per_step: tokens of one optimiser step over all ranks.
    """

    def __init__(self, path: Path, every: int, tokens_per_step: int) -> None:
        self.path, self.every, self.tokens_per_step = path, every, tokens_per_step
        self._clock = (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops lines of steps that a killed run reached beyond its last checkpoint."""
        self._clock = (trainer.global_step, time.monotonic())
        if not trainer.is_global_zero:
            return
        lines = [line for line in read_log(self.path) if line["step"] <= trainer.global_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs loss, terms, learning rate and throughput."""
        step = trainer.global_step
        if step == self._clock[0] or (step % self.every and step != 1):
            return
        seconds = time.monotonic() - self._clock[1]
        speed = (step - self._clock[0]) * self.tokens_per_step / max(seconds, 1e-9)
        self._clock = (step, time.monotonic())
        terms = _over_ranks(trainer, pl_module.last_terms)
        if not trainer.is_global_zero:
            return
        line = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            **terms,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": round(speed, 1),
        }
        self._append(line)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the validation loss."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        names = [name for name in ("val_loss", "val_divergence") if name in trainer.callback_metrics]
        values = {name: float(trainer.callback_metrics[name]) for name in names}
        self._append(
            {"step": trainer.global_step, "tokens": trainer.global_step * self.tokens_per_step, **values}
        )

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _over_ranks(trainer: Trainer, terms: LossTerms) -> dict[str, float]:
    """Terms as means over the ranks, each of which has seen other samples."""
    named = terms.named()
    parts = torch.stack([value.detach().float() for value in named.values()])
    mean = trainer.strategy.reduce(parts, reduce_op="mean")
    return dict(zip(named, mean.tolist(), strict=True))
