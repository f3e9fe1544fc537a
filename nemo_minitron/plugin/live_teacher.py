"""Teacher correction beside a distillation ([P2] section 2): one training publishes, the other takes over."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.trainer import newest_checkpoint, step_of
from nemo_minitron.workspace import training_log
from nemo_minitron.workspace.build import building, discard
from nemo_minitron.workspace.layout import checkpoints_in, snapshot_in, teachers_in
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.typed_json import read_json

_KEPT = 2  # snapshots: one that may just be read, and the newest


class Publishing(Callback):
    """Writes the model that is trained as a Hugging Face folder, every so many steps and at the end.

    Attributes:
        folder: gets ``step=N`` folders; the newest two stay.
        every: steps between them.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes what another training left."""
        self._step = trainer.global_step
        if trainer.is_global_zero and trainer.global_step == 0:
            discard(self.folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Publishes after a step that is due."""
        step = trainer.global_step
        if step != self._step and (step % self.every == 0 or step == trainer.max_steps):
            self._publish(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publishes what a training that ends before its last step comes to."""
        if trainer.global_step != self._step:
            self._publish(trainer, pl_module)

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = step = trainer.global_step
        assert isinstance(pl_module, MinitronModel)
        pl_module.gather()
        if trainer.is_global_zero:
            with building(snapshot_in(self.folder, step)) as temporary:
                pl_module.save_hf(temporary)
            for old in snapshots(self.folder)[:-_KEPT]:
                discard(snapshot_in(self.folder, old))
        trainer.strategy.barrier()


def snapshots(folder: Path) -> list[int]:
    """Steps of the snapshots in a folder, in order."""
    return sorted(int(path.name.removeprefix("step=")) for path in folder.glob("step=*"))


class LiveTeacher(Callback):
    """Puts the newest published weights into the teacher, between two steps.

    What was taken over at which step is written down before it is done, and the files are kept, so
    that a training that was killed learns from the same teachers again.

    Attributes:
        folder: what ``Publishing`` writes.
        state: the training's own folder.
        distillation: the callback whose teacher it is.
        load: loads a snapshot as the teacher was loaded.
    """

    def __init__(
        self,
        folder: Path,
        state: Path,
        distillation: KnowledgeDistillation,
        load: Callable[[Path], Any],
    ) -> None:
        self.folder, self.state, self.distillation, self.load = folder, state, distillation, load
        self._taken: list[dict[str, int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the teacher that the checkpoint was made with."""
        path = self.state / training_log.TEACHERS
        self._taken = read_json(path, list[dict[str, int]]) if path.is_file() else []
        before = [entry for entry in self._taken if entry["step"] < trainer.global_step]
        if before:
            self._put(before[-1]["snapshot"])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Loads a newer teacher, if any, before a step's first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if not self._taken or self._taken[-1]["step"] < step:
            found = trainer.strategy.broadcast(self._find(step) if trainer.is_global_zero else None)
            self._taken += [] if found is None else [found]
        due = [entry["snapshot"] for entry in self._taken if entry["step"] == step]
        if due:
            self._put(due[0])
            if trainer.is_global_zero:
                self._forget()

    def _find(self, step: int) -> dict[str, int] | None:
        """A snapshot newer than the last one, linked and recorded; None if there is none."""
        newest, last = max(snapshots(self.folder), default=0), self._taken[-1:]
        if newest <= (last[0]["snapshot"] if last else 0):
            return None
        try:
            self._keep(newest)
        except FileNotFoundError:  # a newer one has just taken its place: next step
            return None
        entry = {"step": step, "snapshot": newest}
        write_json(self.state / training_log.TEACHERS, [*self._taken, entry])
        return entry

    def _keep(self, snapshot: int) -> None:
        """Links a snapshot's files into the training's own folder; copies them where that cannot be."""
        with building(self._own(snapshot)) as temporary:
            for path in snapshot_in(self.folder, snapshot).iterdir():
                try:
                    os.link(path, temporary / path.name)
                except FileNotFoundError:
                    raise
                except OSError:  # another file system
                    shutil.copyfile(path, temporary / path.name)

    def _own(self, snapshot: int) -> Path:
        return snapshot_in(teachers_in(self.state), snapshot)

    def _put(self, snapshot: int) -> None:
        self.distillation.replace_teacher(self.load(self._own(snapshot)))

    def _forget(self) -> None:
        """Removes teachers that no checkpoint can return to."""
        newest = newest_checkpoint(checkpoints_in(self.state))
        back = 0 if newest is None else step_of(newest)
        before = [entry["snapshot"] for entry in self._taken if entry["step"] < back]
        for snapshot in before[:-1]:
            discard(self._own(snapshot))
