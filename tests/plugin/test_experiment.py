"""NeMo's exp_manager around a training without a stage: its rhythm, how it ends, what is kept of it."""

import gc
import json
import os
import signal
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.handed_on import logged
from nemo_minitron.losses.fused_linear_loss import LossWeights
from nemo_minitron.losses.intermediate import IntermediateWeights
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.experiment import keep_logs
from nemo_minitron.plugin.live_teacher import Publishing, snapshots
from nemo_minitron.plugin.trainer import newest_checkpoint, train
from nemo_minitron.training.preemption import Preempted, TimeOver
from nemo_minitron.training.task_curves import TaskCurves
from tests.support.models import make_model
from tests.support.nemo_training import EXP, distillation, recipe, run, timeless, tokens


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Noted(Callback):
    """Remembers what a training holds, without keeping it."""

    def __init__(self, references):
        self.references = references

    def on_train_start(self, trainer, pl_module):
        parts = (trainer, pl_module, trainer.optimizers[0])
        self.references += [weakref.ref(part) for part in parts]


class Killed(Callback):
    """A process that dies before a step's batch, behind its checkpoint and its validation."""

    def __init__(self, behind):
        self.behind = behind

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.behind:
            raise KeyboardInterrupt


class KilledAtItsEnd(Callback):
    """A process that dies when all is trained, before its artifact is written."""

    def on_train_end(self, *_):
        raise KeyboardInterrupt


def checkpoints_every(monkeypatch, steps):
    saved = EXP["checkpoint_callback_params"]
    rhythm = {**saved, "every_n_train_steps": steps}
    monkeypatch.setitem(EXP, "checkpoint_callback_params", rhythm)


def size(model, task):
    weights = torch.cat([weight.flatten() for weight in model.parameters()])
    return {f"{task}:size": float(weights.double().norm())}  # which no float32 is


def ends_in_parts(folder, state, steps, kills):
    for kill in kills:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(folder, state, steps, [TaskCurves(size, ["model"], 2), kill])
    run(folder, state, steps, [TaskCurves(size, ["model"], 2)])


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "m", "llama")


def test_checkpoints_are_written_by_the_clock(tmp_path, folder, monkeypatch):
    saved = EXP["checkpoint_callback_params"]
    clock = {
        "every_n_train_steps": None,
        "save_top_k": -1,
        "train_time_interval": {"milliseconds": 1},
    }
    monkeypatch.setitem(EXP, "checkpoint_callback_params", {**saved, **clock})
    run(folder, tmp_path / "often", 3)
    clock["train_time_interval"] = "00:01:00:00"
    monkeypatch.setitem(EXP, "checkpoint_callback_params", {**saved, **clock})
    run(folder, tmp_path / "never", 3)
    found = [
        sorted(path.name for path in (tmp_path / name).rglob("*.ckpt"))
        for name in ("often", "never")
    ]
    assert found == [["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"], []]


def test_a_training_that_was_interrupted_stops_early_where_it_would_have(
    tmp_path, folder, monkeypatch
):
    monkeypatch.setitem(EXP, "create_early_stopping_callback", True)
    monkeypatch.setitem(EXP, "early_stopping_callback_params", {"patience": 2, "min_delta": 100.0})
    run(folder, tmp_path / "straight", 9, [Publishing(tmp_path / "live", 100)])
    assert snapshots(tmp_path / "live") == [6]  # its end, too
    with pytest.raises(Preempted):
        run(folder, tmp_path / "parts", 9, [Stop(5)])
    assert newest_checkpoint(tmp_path / "parts" / "nemo" / "checkpoints").name == "step=5.ckpt"
    run(folder, tmp_path / "parts", 9)
    for name in ("straight", "parts"):
        stop = json.loads((tmp_path / name / "stopped.json").read_text())
        assert stop == {"step": 6, "reason": "early stopping on val_loss"}
    monkeypatch.setitem(EXP, "create_early_stopping_callback", False)
    run(folder, tmp_path / "parts", 9)  # killed before its artifact was there, and asked for more
    assert not (tmp_path / "parts" / "stopped.json").exists()


@pytest.mark.parametrize(("least", "end"), [(4, 6), (9, 9)])
def test_early_stopping_ends_a_training_behind_its_least_number_of_steps(
    tmp_path, folder, monkeypatch, least, end
):
    monkeypatch.setitem(EXP, "create_early_stopping_callback", True)
    monkeypatch.setitem(EXP, "early_stopping_callback_params", {"patience": 2, "min_delta": 100.0})
    run(folder, tmp_path / "state", 14, min_steps=least)
    stop = json.loads((tmp_path / "state" / "stopped.json").read_text())
    assert stop == {"step": end, "reason": "early stopping on val_loss"}


@pytest.mark.parametrize(
    ("params", "stops"),
    [
        ({"patience": 2, "min_delta": 100.0}, 6),
        ({"patience": 2, "min_delta": 0.45}, 10),  # some validations are better
        ({"patience": 2, "min_delta": 100.0, "monitor": "train_loss"}, 6),
        ({"patience": 1, "min_delta": 100.0, "monitor": "model:size"}, 8),  # measured at 4 and 8
    ],
)
def test_each_validation_counts_once_for_early_stopping_however_often_it_resumes(
    tmp_path, folder, monkeypatch, params, stops
):
    """Checkpoints are written at the steps of validations, and before them."""
    checkpoints_every(monkeypatch, 2)
    monkeypatch.setitem(EXP, "create_early_stopping_callback", True)
    monkeypatch.setitem(EXP, "early_stopping_callback_params", params)
    often = [Killed(2), Killed(3), Killed(stops - 1)]
    for name, kills in (
        ("straight", []),
        ("once", [Killed(stops - 1)]),
        ("often", often),
        ("late", [KilledAtItsEnd()]),
    ):
        ends_in_parts(folder, tmp_path / name, 14, kills)
        stop = json.loads((tmp_path / name / "stopped.json").read_text())
        reason = f"early stopping on {params.get('monitor', 'val_loss')}"
        assert stop == {"step": stops, "reason": reason}, name
        assert timeless(tmp_path / name) == timeless(tmp_path / "straight"), name


def test_a_profile_and_copied_files_are_kept_and_what_nobody_asked_for_is_not(
    tmp_path, folder, monkeypatch, capsys
):
    (tmp_path / "notes.txt").write_text("of the user")
    monkeypatch.setitem(EXP, "files_to_copy", [str(tmp_path / "notes.txt")])
    state, target = tmp_path / "state", tmp_path / "student"
    run(folder, state, 1, profiler="simple", enable_model_summary=True)
    assert "Trainable params" in capsys.readouterr().err
    (state / "nemo" / "link").symlink_to(tmp_path / "notes.txt")
    keep_logs(state, target)
    kept = {path.name: path for path in (target / "logs").iterdir()}
    assert set(kept) == {"notes.txt", "fit-profile.txt"}
    assert "run_training_batch" in kept["fit-profile.txt"].read_text()
    with pytest.raises(ValueError, match=r"trainer\.profiler: expected one of simple, advanced"):
        run(folder, state, 1, profiler="xyz")


def test_where_files_cannot_have_two_names_logs_are_copied(tmp_path, folder, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    (tmp_path / "state" / "nemo" / "wandb").mkdir(parents=True)
    (tmp_path / "state" / "nemo" / "wandb" / "run").write_text("a run")
    monkeypatch.setattr(os, "link", refuse)
    keep_logs(tmp_path / "state", tmp_path / "student")
    assert (tmp_path / "student" / "logs" / "wandb" / "run").read_text() == "a run"


def test_a_signal_and_the_end_of_its_time_are_told_apart(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(EXP, "max_time_per_run", {"days": 1})
    with pytest.raises(Preempted, match="stopped by SIGTERM at step 2 of 3") as stopped:
        run(folder, tmp_path / "state", 3, [Stop(2)])
    assert not isinstance(stopped.value, TimeOver)  # a flow may try that again
    long_ago = replace(recipe(3), started=time.monotonic() - 24 * 3600)
    model, config = load_model(folder), read_config(folder)
    with pytest.raises(TimeOver, match=r"stopped by exp_manager\.max_time_per_run at step 1 of 3"):
        train(model, config, folder, long_ago, tokens(), tokens(8), tmp_path / "other")


@pytest.mark.parametrize("ends", ["well", "by a signal"])
def test_a_training_leaves_no_model_behind_and_gives_the_signals_back(tmp_path, folder, ends):
    """Lightning's handler would keep trainer, student, teacher and optimiser alive, and swallow a later SIGTERM."""
    watched = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in watched]
    learns = distillation(folder, None)
    kept = [weakref.ref(learns.teacher)]
    callbacks = [learns, Noted(kept), *([Stop(2)] if ends == "by a signal" else [])]
    with pytest.raises(Preempted) if ends == "by a signal" else nullcontext():
        run(folder, tmp_path / "state", 3, callbacks)
    assert [signal.getsignal(number) for number in watched] == before
    del learns, callbacks
    gc.collect()
    assert len(kept) == 4 and [reference() for reference in kept] == [None] * 4


@pytest.mark.parametrize(
    ("weights", "inside", "terms"),
    [(None, None, ()), (LossWeights(), None, ("divergence",)), (LossWeights(0.0, 1.0), None, ()),
     (LossWeights(), ("hidden",), ("divergence", "intermediate", "alpha"))],
)  # fmt: skip
def test_the_metrics_that_are_named_are_those_that_are_logged(tmp_path, weights, inside, terms):
    folder, seen = make_model(tmp_path / "m", "llama"), []
    inside = None if inside is None else IntermediateWeights(inside, layers=((0, 0),))
    taught = [] if weights is None else [distillation(folder, inside, weights=weights)]

    class Look(Callback):
        def on_train_end(self, trainer, module):
            seen.extend(trainer.callback_metrics)

    run(folder, tmp_path / "state", 2, [*taught, Look()])
    assert sorted(seen) == sorted(logged(terms))
