"""Exponential moving average of the weights, validated and written in their place."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Averaging(Callback):
    """average <- decay x average + (1 - decay) x weights, after every step.

    NeMo's own (``exp_manager.ema``) keeps the average beside a training whose result is the last
    weights; here the average is what is validated and what comes out. It is kept in float32: in
    bfloat16 a thousandth of the way to the weights would round to nothing.

    Attributes:
        decay: between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins with the weights, unless a checkpoint has brought an average."""
        for name, weight in self._weights(pl_module):
            if name not in self._average:
                self._average[name] = weight.detach().to(torch.float32, copy=True)
            self._average[name] = self._average[name].to(weight.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average once a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        with torch.no_grad():
            for name, weight in self._weights(pl_module):
                self._average[name].lerp_(weight.float(), 1 - self.decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average in the weights' place."""
        self._own = {name: weight.detach().clone() for name, weight in self._weights(pl_module)}
        self._put(pl_module, self._average)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the weights back."""
        self._put(pl_module, self._own)
        self._own = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average as the result."""
        self._put(pl_module, self._average)

    def state_dict(self) -> dict[str, Any]:
        """The average, for the checkpoint."""
        return {
            "average": {name: value.cpu() for name, value in self._average.items()},
            "step": self._step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it over."""
        self._average, self._step = dict(state_dict["average"]), state_dict["step"]

    def _weights(self, pl_module: LightningModule) -> list[tuple[str, Tensor]]:
        # what training.only freezes is its own average
        named = pl_module.model.named_parameters()
        return [(name, weight) for name, weight in named if weight.requires_grad]

    def _put(self, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self._weights(pl_module):
                weight.copy_(values[name])
