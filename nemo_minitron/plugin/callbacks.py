"""Lightning callbacks: distillation, model transforms, exact resume, a loss guard, the training log."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from nemo_minitron.artifacts.log import read_log
from nemo_minitron.bridge.models import frozen, head_of, hidden_states, softcap_of
from nemo_minitron.core.losses import LossTerms, LossWeights, fused_linear_loss
from nemo_minitron.families import Family
from nemo_minitron.plugin.model import MinitronModel

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


class KnowledgeDistillation(Callback):
    """Trains the model against a frozen teacher by logits ([P1] section 3).

    The teacher is no part of the trained module: it is in no checkpoint and no optimiser.

    Attributes:
        teacher: a Hugging Face causal LM; its vocabulary is the student's.
        family: the teacher's family.
        weights: the mix of the losses.
        chunk_tokens: tokens whose logits exist at a time, or None.
        vocabulary: entries that count, where the models' vocabularies are padded to different sizes; None:
            all.
    """

    def __init__(
        self,
        teacher: Any,
        family: Family,
        weights: LossWeights,
        chunk_tokens: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.family, self.weights, self.chunk_tokens = family, weights, chunk_tokens
        self.vocabulary = vocabulary

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over the model's objective.

        Raises:
            ValueError: the vocabularies differ, and nothing says how much of them is padding.
        """
        assert isinstance(pl_module, MinitronModel), type(pl_module)
        ours, theirs = head_of(pl_module.model).shape[0], head_of(self.teacher).shape[0]
        if ours != theirs and self.vocabulary is None:
            raise ValueError(f"vocabulary: the teacher has {theirs} entries, the student {ours}")
        pl_module.objective = self.objective

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the teacher to the student's device."""
        self.teacher.to(pl_module.device)

    def objective(
        self, hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor, tokens_BS: Tensor, softcap: float | None
    ) -> LossTerms:
        """Divergence from the teacher on the same tokens; shapes as in ``plugin.model.Objective``."""
        with torch.no_grad(), frozen(self.teacher):
            teacher_TG = hidden_states(self.teacher, self.family, tokens_BS).flatten(0, 1)
        teacher = (teacher_TG, head_of(self.teacher))
        caps = (softcap, softcap_of(self.teacher, self.family))
        return fused_linear_loss(
            hidden_TH, head_VH, labels_T, self.weights, teacher, self.chunk_tokens, caps, self.vocabulary
        )


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
        line = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": float(terms.loss.detach()),
            "ce": float(terms.ce),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": round(speed, 1),
        }
        if not trainer.is_global_zero:
            return
        more = {} if torch.isnan(terms.divergence) else {"divergence": float(terms.divergence)}
        self._append({**line, **more})

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


def _over_ranks(trainer: Trainer, terms: LossTerms) -> LossTerms:
    """Terms as means over the ranks, each of which has seen other samples."""
    parts = torch.stack([terms.loss.detach().float(), terms.divergence.float(), terms.ce.float()])
    mean = trainer.strategy.reduce(parts, reduce_op="mean")
    return LossTerms(mean[0], mean[1], mean[2])
