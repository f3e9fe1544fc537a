"""Lightning callbacks: exact resume, the training log."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.config.batch_limit import batches_of_epoch
from nemo_minitron.training.early_stopping import watched
from nemo_minitron.training.loss_guard import settle
from nemo_minitron.training.phases import learning_rate
from nemo_minitron.training.task_curves import validated
from nemo_minitron.workspace.atomic import replacing
from nemo_minitron.workspace.progress import note
from nemo_minitron.workspace.training_log import read_log


class ExactResume(Callback):
    """Makes a checkpoint that was written after a batch's step resume behind that batch.

    Lightning 2.4 writes such checkpoints before it counts the batch as completed, and counts from
    the completed ones on resuming: one batch is lost from the accumulation of gradients and from
    the rhythm of validation. And it counts in micro-batches, of which a step may have another
    number than before. A validation that is made up for would leave out as many batches as the one
    before it has read. What a model draws by chance (dropout) neither of them carries over: here
    each micro-batch of a step and each reader of samples has a seed of its own.

    Attributes:
        seed: of the draws.
        tensor_parallel: ranks that share the work on each sample, and draw the same.
    """

    def __init__(self, seed: int = 0, tensor_parallel: int = 1) -> None:
        self.seed, self.tensor_parallel = seed, tensor_parallel
        self._resumed = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts the micro-batches of every step that was taken as completed; steps are when we save.

        And none of the next validation.
        """
        per_step = trainer.accumulate_grad_batches
        batches = checkpoint["global_step"] * per_step
        epoch = batches_of_epoch(trainer.limit_train_batches, trainer.max_steps * per_step)
        of_epoch = (batches - 1) % epoch + 1 if batches else 0
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        validation = loops["epoch_loop.val_loop.batch_progress"]["current"]
        for counts, done in (
            (progress["current"], of_epoch),
            (progress["total"], batches),
            (validation, 0),
        ):
            counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), done))
        self._resumed = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends Lightning's restart mode with the first batch, not after it.

        NeMo validates nothing while the loop restarts, so the batch would go without the validation
        that is due behind it. And a validation that the restart made up for has counted as a step.

        Then seeds what the batch will draw.
        """
        if self._resumed:
            self._resumed = False
            loop = trainer.fit_loop.epoch_loop
            loop.restarting, loop._batches_that_stepped = False, trainer.global_step
        micro, reader = (
            batch_idx % trainer.accumulate_grad_batches,
            trainer.global_rank // self.tensor_parallel,
        )
        draw = (
            (self.seed * 1_000_003 + trainer.global_step) * 1_000_003 + micro
        ) * 1_000_003 + reader
        _seed(draw % 2**63, pl_module.device)


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the draws of a device and of the CPU.

    ``torch.manual_seed`` also notes, for each kind of device that is not in use, who asked for it:
    that takes a millisecond.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


class TrainingLog(Callback):
    """Appends one JSON line per logged step to a file, also across resumed runs.

    Attributes:
        path: the file.
        every: steps between lines; step 1 and validations are always logged.
        tokens_per_step: tokens of one optimiser step over all ranks.
        flops_per_token: of the model's forward and backward pass, and of the teacher's forward
            pass; what is computed a second time (activation checkpointing) does not count.
        peak_tflops: what a device can do at best, in 1e12 FLOP/s, for ``mfu``; None: as
            ``PEAK_TFLOPS`` has it.
        done: tokens and FLOPs of a training's first steps, where not all steps have as many.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        tokens_per_step: int,
        flops_per_token: int = 0,
        peak_tflops: float | None = None,
        done: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self.path, self.every, self.tokens_per_step = path, every, tokens_per_step
        self.flops_per_token, self.peak_tflops = flops_per_token, peak_tflops
        self.done = done or self._alike
        self._clock = (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops lines of steps that a killed run reached beyond its last checkpoint."""
        self._clock = (trainer.global_step, time.monotonic())
        if not trainer.is_global_zero:
            return
        lines = read_log(self.path)
        kept = [line for line in lines if line["step"] <= trainer.global_step]
        if len(kept) < len(lines):
            with replacing(self.path) as fresh:
                fresh.write_text(
                    "".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs loss, terms, learning rate and throughput."""
        step = trainer.global_step
        if trainer.is_global_zero:
            note("training", step, trainer.max_steps)
        if step == self._clock[0] or (step % self.every and step != 1):
            return
        seconds = time.monotonic() - self._clock[1]
        (tokens, flops), before = self.done(step), self.done(self._clock[0])
        speeds = [
            (now - then) / max(seconds, 1e-9)
            for now, then in zip((tokens, flops), before, strict=True)
        ]
        self._clock = (step, time.monotonic())
        settle(trainer)
        terms = pl_module.learned.means(trainer.strategy)
        if not trainer.is_global_zero:
            return
        rate = {"lr": learning_rate(trainer), **self._throughput(trainer, *speeds)}
        self._append({"step": step, "tokens": tokens, **terms, **rate})
        for logger in trainer.loggers:  # the terms are there already: the model logs them
            logger.log_metrics({"tokens": tokens, **rate}, step)

    def _alike(self, step: int) -> tuple[int, int]:
        tokens = step * self.tokens_per_step
        return tokens, tokens * self.flops_per_token

    def _throughput(
        self, trainer: Trainer, tokens_per_second: float, flops_per_second: float
    ) -> dict[str, float]:
        """Tokens a second over all ranks, TFLOP/s of one, and what share of its peak that is."""
        tflops = flops_per_second / trainer.world_size / 1e12
        values = {"tokens_per_second": _short(tokens_per_second), "tflops": _short(tflops)}
        peak = self.peak_tflops or _peak(trainer.strategy.root_device)
        return values if peak is None else {**values, "mfu": _short(tflops / peak)}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the validation loss, and all that early stopping goes by."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        step = trainer.global_step
        values = watched(trainer) | validated(trainer) | pl_module.facts
        self._append({"step": step, "tokens": self.done(step)[0], **values})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181,
    "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""Dense bfloat16 matrix products with float32 sums, 1e12 FLOP/s, as the makers' data sheets give them."""


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _short(value: float) -> float:
    """Five significant digits, whatever the size."""
    return float(f"{value:.5g}")
