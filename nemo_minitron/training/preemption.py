"""Signals during a training.

SIGTERM and SIGUSR1, or the end of its time: it finishes the current step, saves and ends, to be run
again. Ctrl-C ends it at once, and where Python drops the exception (raised while an object is being
destroyed), behind the step.
"""

import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils.callbacks import NeMoModelCheckpoint

TIME = "exp_manager.max_time_per_run"
"""The key that limits how long a run trains."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send before they end a job (Slurm: --signal; torchrun dies of USR1)."""


class Preempted(RuntimeError):
    """A training was stopped by a signal, and has saved its state."""


class TimeOver(Preempted):
    """The time is over that a run may train, and it has saved its state: another try would be another run."""


class Preemption(Callback):
    """Saves and stops at the end of the step during which a signal came, without a validation.

    NeMo's own limit of a run's time saves only where ``save_last`` is set, so that it would lose the
    steps behind the last checkpoint.

    Attributes:
        folder: where checkpoints lie.
        limit: how long a run may take, as if a signal came then; None: as long as it takes.
        started: when the run began, by ``time.monotonic``.
        received: name of the signal that came, or None.
        interrupted: whether Ctrl-C was pressed.
    """

    def __init__(
        self, folder: Path, limit: timedelta | None = None, started: float | None = None
    ) -> None:
        self.folder, self.limit = folder, limit
        self.started = time.monotonic() if started is None else started
        self.received: str | None = None
        self.interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals, from Lightning too; only a process' main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            own = signal.getsignal(signal.SIGINT)
            if callable(own):  # else it is to be ignored
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self._before[signal.SIGINT](number, frame)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and stops, on all ranks together, where it is due on one of them; between steps only.

        Raises:
            Preempted, TimeOver: the step that was saved, and how to resume.
            KeyboardInterrupt: Ctrl-C was pressed, and came to nothing.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        over = self.limit is not None and _on_any_rank(
            trainer, time.monotonic() - self.started >= self.limit.total_seconds()
        )
        came = _on_any_rank(trainer, self.received is not None)
        if not (came or over) or trainer.global_step >= trainer.max_steps:
            return
        save_step(trainer, self.folder)
        cause = (self.received or "a signal on another rank") if came else TIME
        raise (Preempted if came else TimeOver)(
            f"stopped by {cause} at step {trainer.global_step} of {trainer.max_steps}, which is saved; run "
            "it again to resume"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back, those that are still its own.

        Lightning has put back by now what was there before the training. What was there when the steps
        began is Lightning's own handler, which would keep trainer and models alive, and take the signals
        that come later. And while it ends by Ctrl-C it ignores that.
        """
        for number, handler in self._before.items():
            if signal.getsignal(number) in (self._note, self._interrupt):
                signal.signal(number, handler)
        self._before = {}


def save_step(trainer: Trainer, folder: Path) -> None:
    """Saves the step that a training is at, unless it is there."""
    path = folder / f"step={trainer.global_step}.ckpt"
    if not path.exists():
        # NeMo's marker: a checkpoint beside it is not finished, and not resumed from
        NeMoModelCheckpoint.set_checkpoint_unfinished_marker(path, barrier_after=True)
        trainer.save_checkpoint(path)
        NeMoModelCheckpoint.remove_checkpoint_unfinished_marker(path, barrier_before=True)


def _on_any_rank(trainer: Trainer, here: bool) -> bool:
    if trainer.world_size == 1:
        return here
    found: bool = trainer.strategy.reduce_boolean_decision(here, all=False)
    return found
