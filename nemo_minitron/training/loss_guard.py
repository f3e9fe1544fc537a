"""Guards of a training: a loss that is not finite, or a spike, never reaches the weights that are kept."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.training.late_reads import LateRead


class BadStep(FloatingPointError):
    """A step that was not taken: its loss or gradient was not finite, or its loss was a spike.

    Attributes:
        step: its number, from 0.
        reason: what was wrong.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step + 1}: {reason}; the last checkpoint is good")
        self.step, self.reason = step, reason


@dataclass(frozen=True)
class Spikes:
    """What counts as a spike.

    Attributes:
        factor: a loss above this many times the median of the last steps; None: nothing is a spike.
        window: how many steps make the median; before there are as many, nothing is a spike.
    """

    factor: float | None = None
    window: int = 32


class LossGuard(Callback):
    """Looks at the loss and the gradient of every step: on the CPU before the weights do.

    An accelerator has them later than the host asks. There a step is judged before the next one is
    taken, and before anything is saved, logged or validated: what a bad one did to the weights is lost
    with them, and the training resumes from a checkpoint, if at all.

    Under several ranks all of them come to the same verdict: it rests on means over them, and on
    gradients, which they share.
    """

    def __init__(self, spikes: Spikes | None = None) -> None:
        self.spikes = spikes or Spikes()
        self._losses: deque[float] = deque(maxlen=self.spikes.window)
        self._micro: list[torch.Tensor] = []
        self._loss: tuple[int, torch.Tensor] | None = None
        self._waiting: tuple[int, LateRead] | None = None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the loss of a micro-batch."""
        learned = pl_module.learned.last
        self._micro.append(
            torch.stack([pl_module.last_terms.loss.detach().float() * learned, learned])
        )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Notes the loss of a step; ``judge_gradients`` follows, and has the rest.

        Raises:
            BadStep: on an accelerator, the step before it must not have been taken.
        """
        self.settle()
        total, tokens = trainer.strategy.reduce(torch.stack(self._micro).sum(0), reduce_op="sum")
        self._micro = []
        self._loss = (trainer.global_step, total / tokens.clamp_min(1))

    def judge_gradients(self, norm: torch.Tensor | None) -> None:
        """Judges the step whose loss was noted.

        Args:
            norm: of its gradients, a scalar; None: not to be judged.

        Raises:
            BadStep: it must not be taken (on an accelerator that is known when the next one is).
        """
        if self._loss is None:  # there was no step: the training begins
            return
        (step, loss), self._loss = self._loss, None
        found = [number.float() for number in (loss, norm) if number is not None]
        if loss.device.type == "cpu":
            self._judge(step, *map(float, found))
        else:
            self._waiting = (step, LateRead(torch.stack(found)))

    def settle(self) -> None:
        """Judges the step that still waits for it.

        Raises:
            BadStep: it must not have been taken.
        """
        if self._waiting is not None:
            (step, numbers), self._waiting = self._waiting, None
            self._judge(step, *numbers.values())

    def _judge(self, step: int, loss: float, norm: float = 0.0) -> None:
        if not math.isfinite(loss):
            raise BadStep(step, f"the loss is {loss}")
        if not math.isfinite(norm):
            raise BadStep(step, f"the gradient is {norm}")
        if self.spikes.factor is not None and len(self._losses) == self.spikes.window:
            usual = statistics.median(self._losses)
            if loss > self.spikes.factor * usual:
                raise BadStep(
                    step,
                    f"the loss is {loss:.4g}, a spike: the last {self.spikes.window} steps had "
                    f"{usual:.4g} in the median",
                )
        self._losses.append(loss)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No bad weights are validated."""
        self.settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges the last step."""
        self.settle()

    def state_dict(self) -> dict[str, Any]:
        """The losses that a resumed training measures spikes by; nothing bad is saved.

        Raises:
            BadStep: the last step must not have been taken.
        """
        self.settle()
        return {"losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them over."""
        self._losses.extend(state_dict["losses"])


def settle(trainer: Trainer | None) -> None:
    """Judges the step that still waits for it, on all ranks: whoever writes weights or losses asks first.

    Raises:
        BadStep: it must not have been taken.
    """
    for guard in guards(trainer):
        guard.settle()


def guards(trainer: Trainer | None) -> list[LossGuard]:
    """The guards of a training."""
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, LossGuard)]


def weights_of(optimizer: Any) -> list[torch.Tensor]:
    """The weights that an optimiser trains; to find them by modules takes as long as to clip them."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def gradients_of(optimizer: Any) -> list[torch.Tensor]:
    """The gradients that it takes a step by."""
    return [weight.grad for weight in weights_of(optimizer) if weight.grad is not None]


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all gradients, a scalar; over all ranks where they are sharded."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        # those of different meshes (split by tensor parallelism, or not) do not mix in one operation
        groups.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group) for group in groups.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))
