"""The weights of the best validation as the result of a training."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file

from nemo_minitron.training.task_curves import validated
from nemo_minitron.workspace.atomic import replacing
from nemo_minitron.workspace.layout import best_in, metrics_in, snapshot_in
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.training_log import KEPT, read_log


class BestWeights(Callback):
    """Keeps the weights of the best validation on disk, and puts them into the model in the end.

    Which validation was the best the log says, so that a resumed training knows it as well as one
    that never stopped. A file is whole before its line is in the log, and stays for as long as a
    checkpoint could need it.

    Attributes:
        measure: ``val_loss``, or a task's measure.
        higher: whether more of it is better.
        state: folder of the training's state.
    """

    def __init__(self, measure: str, higher: bool, state: Path) -> None:
        self.measure, self.higher, self.state = measure, higher, state
        self._saved: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the weights where none were better; of an average it is the average."""
        values = validated(trainer)
        if trainer.sanity_checking or not trainer.is_global_zero or self.measure not in values:
            return
        step, lines = trainer.global_step, read_log(metrics_in(self.state))
        before = [line for line in lines if line["step"] < step]
        best = best_line([*before, {"step": step, **values}], self.measure, self.higher)
        if best is None or best["step"] != step:
            return
        best_in(self.state).mkdir(exist_ok=True)
        weights = {
            name: weight.detach().to("cpu", copy=True).contiguous()
            for name, weight in pl_module.model.named_parameters()
        }
        with replacing(snapshot_in(best_in(self.state), step)) as temporary:
            save_file(weights, temporary)
        self._remove_others(before, step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes from where a training may resume: from here, and until this is whole, from the one before."""
        self._saved = [*self._saved[-1:], trainer.global_step]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The same for the checkpoint that it resumes from."""
        self._saved = [checkpoint["global_step"]]

    def _remove_others(self, lines: Sequence[Mapping[str, Any]], newest: int) -> None:
        needed = {newest}
        for saved in self._saved:
            seen = [line for line in lines if line["step"] <= saved]
            best = best_line(seen, self.measure, self.higher)
            needed |= set() if best is None else {best["step"]}
        kept = {snapshot_in(best_in(self.state), step) for step in needed}
        for path in best_in(self.state).glob("[!.]*"):
            if path not in kept:
                path.unlink()

    def put(self, model: Any) -> None:
        """Puts the best weights into the model, and notes where they come from; rank 0 alone needs them.

        Raises:
            ValueError: their file is gone.
        """
        best = best_line(read_log(metrics_in(self.state)), self.measure, self.higher)
        (self.state / KEPT).unlink(missing_ok=True)
        if best is None:
            print(
                f"training.keep: {self.measure} was never measured; kept the last", file=sys.stderr
            )
            return
        path = snapshot_in(best_in(self.state), best["step"])
        if not path.is_file():
            raise ValueError(
                f"{path}: the weights of step {best['step']}, the best in {self.measure}, are gone; "
                "training.keep=last keeps the last ones"
            )
        stored = load_file(path)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(stored[name])
        kept = {"step": best["step"], "measure": self.measure, "value": best[self.measure]}
        write_json(self.state / KEPT, kept)


def best_line(
    lines: Sequence[Mapping[str, Any]], measure: str, higher: bool
) -> Mapping[str, Any] | None:
    """The first line of a log with the best value of a measure; None: it was never measured."""
    known = [line for line in lines if measure in line and not math.isnan(line[measure])]
    sign = -1 if higher else 1
    return min(known, key=lambda line: sign * line[measure], default=None)
