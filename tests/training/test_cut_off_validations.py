"""A validation that a kill has cut off is made up for, in the middle of a training and at its end."""

import json

import pytest
from lightning.pytorch import Callback

from nemo_minitron.plugin.trainer import Options, newest_checkpoint
from nemo_minitron.training.best_weights import BestWeights
from nemo_minitron.training.task_curves import TaskCurves
from nemo_minitron.workspace.layout import checkpoints_in
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import make_model
from tests.support.nemo_training import EXP, run, timeless


class Killed(Callback):
    """A process that dies in the validation of a step: behind its first batch, or in its tasks."""

    def __init__(self, step, tasks):
        self.step, self.tasks = step, tasks

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.tasks:
            raise KeyboardInterrupt

    def on_validation_epoch_end(self, trainer, *_):
        if trainer.global_step == self.step and self.tasks:
            raise KeyboardInterrupt


def size(model, task):
    return {f"{task}:size": float(sum(weight.double().norm() for weight in model.parameters()))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Checkpoints at the steps of validations."""
    saved = {**EXP["checkpoint_callback_params"], "every_n_train_steps": 2}
    monkeypatch.setitem(EXP, "checkpoint_callback_params", saved)
    return make_model(tmp_path / "m", "llama")


def trained(folder, state, kill=None, **options):
    """A training that keeps its best weights, killed where that is asked for, and run again."""
    options["options"] = Options(ema_decay=0.9, **options.pop("options", {}))

    def once(*more):
        watching = [TaskCurves(size, ["model"], 2), BestWeights("val_loss", False, state)]
        return run(folder, state, 6, [*watching, *more], **options)

    if kill is not None:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            once(kill)
        assert newest_checkpoint(checkpoints_in(state)).name == f"step={kill.step}.ckpt"
        validated = [line for line in read_log(state / "metrics.jsonl") if "val_loss" in line]
        assert kill.step not in [line["step"] for line in validated]
    return dict(once().model.named_parameters())


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("tasks", [False, True])
def test_a_training_killed_in_a_validation_ends_as_one_that_was_not(tmp_path, folder, step, tasks):
    """What it has measured, whatever it is measured by, and so the weights that it keeps."""
    whole = trained(folder, tmp_path / "whole")
    parts = trained(folder, tmp_path / "parts", Killed(step, tasks))
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    kept = [json.loads((tmp_path / name / "kept.json").read_text()) for name in ("whole", "parts")]
    assert kept[0] == kept[1] and kept[0]["step"] == 6
    assert all(parts[name].equal(weight) for name, weight in whole.items())


def test_so_is_the_one_behind_a_stop_outside_of_the_rhythm(tmp_path, folder):
    stops = {"options": {"stop_after": 5}}
    trained(folder, tmp_path / "whole", **stops)
    trained(folder, tmp_path / "parts", Killed(5, False), **stops)
    validated = [line["step"] for line in timeless(tmp_path / "whole") if "val_loss" in line]
    assert validated == [2, 4, 5]
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("monitor", ["val_loss", "train_loss", "learning_rate"])
def test_early_stopping_judges_it_by_metrics_of_training_too(
    tmp_path, folder, monkeypatch, monitor
):
    params = {"patience": 1, "min_delta": 100.0, "monitor": monitor}
    monkeypatch.setitem(EXP, "create_early_stopping_callback", True)
    monkeypatch.setitem(EXP, "early_stopping_callback_params", params)
    trained(folder, tmp_path / "whole")
    trained(folder, tmp_path / "parts", Killed(4, False))
    for name in ("whole", "parts"):
        stopped = json.loads((tmp_path / name / "stopped.json").read_text())
        assert stopped == {"step": 4, "reason": f"early stopping on {monitor}"}
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


def test_one_that_is_in_the_log_is_not_made_again(tmp_path, folder):
    trained(folder, tmp_path / "state")
    before = timeless(tmp_path / "state")
    trained(folder, tmp_path / "state")  # as one that was killed before its artifact was written
    assert timeless(tmp_path / "state") == before


def test_callbacks_have_their_say_at_the_end_of_a_training_killed_there(
    tmp_path, folder, monkeypatch
):
    """NeMo's archive, for one: it is written behind the last validation."""

    class KilledAtItsEnd(Callback):
        def on_train_end(self, *_):
            raise KeyboardInterrupt

    saved = {**EXP["checkpoint_callback_params"], "save_nemo_on_train_end": True}
    monkeypatch.setitem(EXP, "checkpoint_callback_params", saved)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(folder, tmp_path / "state", 6, [KilledAtItsEnd()])
    assert not list((tmp_path / "state").rglob("*.nemo"))
    run(folder, tmp_path / "state", 6)
    assert len(list((tmp_path / "state").rglob("*.nemo"))) == 1
