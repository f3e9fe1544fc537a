"""The log of a training that resumes."""

import json
import os

from lightning.pytorch import Trainer

from nemo_minitron.training.callbacks import TrainingLog
from nemo_minitron.workspace.training_log import read_log


def started(path, steps):
    """A log of some steps, as a training finds it that has taken two, and another name of that file."""
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps))
    os.link(path, other := path.with_name("as_it_was"))
    os.utime(path, (0, 0))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 2
    assert trainer.global_step == 2
    TrainingLog(path, 1, 1).on_train_start(trainer, None)
    return other


def test_lines_of_steps_that_come_again_go_and_no_kill_leaves_a_part(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = started(path, (1, 2, 3))
    assert [line["step"] for line in read_log(path)] == [1, 2]
    assert [line["step"] for line in read_log(before)] == [1, 2, 3]  # until the new one was there
    assert sorted(os.listdir(tmp_path)) == ["as_it_was", "metrics.jsonl"]


def test_a_log_that_stays_is_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = started(path, (1, 2))
    assert os.path.samefile(path, before) and path.stat().st_mtime == 0
