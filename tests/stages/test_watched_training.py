"""Trainings that are measured on tasks while they train, and keep the weights that were best."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.report_page import _task_curves
from nemo_minitron.plugin.trainer import newest_checkpoint, step_of
from nemo_minitron.training.best_weights import BestWeights, best_line
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import make_model
from tests.support.nemo_training import run
from tests.support.processes import until
from tests.support.runs import prune, refused, started
from tests.support.two_ranks import curve, on_two_ranks, weights

MEASURE = "held_out_choice:acc"


@pytest.fixture
def watched(words_often):
    """A training of which every second validation measures a task on a few documents."""
    return [
        *words_often, "trainer.max_steps=12", "training.validate_every=2", "training.task_every=2",
        "training.tasks=[held_out_choice,held_out_bytes]", "training.task_limit=12", "optim.lr=0.02",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=5", "data.holdout=0.2",
    ]  # fmt: skip


def distilled(place, *words):
    prune(place, *words)
    assert main(["distill", f"workspace={place}", *words]) == 0
    return place / "student"


def test_tasks_are_measured_on_the_live_student_and_change_nothing(tmp_path, watched, capsys):
    student = distilled(tmp_path / "with", *watched, "exp_manager.create_tensorboard_logger=true")
    lines = read_log(student / "metrics.jsonl")
    measured = [line for line in lines if MEASURE in line]
    assert [line["step"] for line in measured] == [4, 8, 12]
    assert all(
        {"val_loss", f"{MEASURE}_stderr", "held_out_bytes:bits_per_byte"} <= set(line)
        for line in measured
    )
    assert (
        len({line["held_out_bytes:bits_per_byte"] for line in measured}) == 3
    )  # of a living model
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6, 8, 10, 12]
    assert MEASURE in (student / "metrics.csv").read_text().splitlines()[0]
    (events,) = student.rglob("events.out.*")
    assert MEASURE.encode() in events.read_bytes()
    without = [*watched, "training.tasks=[]"]
    capsys.readouterr()
    assert main(["distill", f"workspace={tmp_path / 'with'}", *without]) == 0
    assert "already done" in capsys.readouterr().out  # looking decides nothing
    distilled(tmp_path / "plain", *without)
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, weights(tmp_path / "with")[name]), name
    report = {"models": {"teacher": {}, "student": {}}}
    picture = _task_curves(tmp_path / "with", report)
    assert picture is not None and picture.startswith("data:image/png")
    assert _task_curves(tmp_path / "plain", report) is None


def test_two_ranks_share_the_tasks_and_keep_what_one_keeps(tmp_path, watched):
    words = [*watched, "training.keep=best:held_out_bytes", "optim.lr=0.005", "trainer.max_steps=8"]
    one, two = tmp_path / "one", tmp_path / "two"
    distilled(one, *words)
    prune(two, *words)
    done = on_two_ranks("distill", f"workspace={two}", *words, "distill.batch_size=1")
    assert done.returncode == 0, done.stderr[-3000:]
    measured = [
        {name: value for name, value in line.items() if ":" in name} | {"step": line["step"]}
        for place in (one, two)
        for line in curve(place)
        if MEASURE in line
    ]
    assert [line["step"] for line in measured] == [4, 8, 4, 8]
    for alone, shared in zip(measured[:2], measured[2:], strict=True):
        assert shared == pytest.approx(alone, rel=1e-3)
    kept = [json.loads((place / "student" / "kept.json").read_text()) for place in (one, two)]
    assert kept[0]["step"] == kept[1]["step"]


@pytest.mark.parametrize(
    ("keep", "measure", "best"),
    [("best:loss", "val_loss", min), ("best:held_out_choice", MEASURE, max)],
)
def test_a_killed_training_keeps_the_weights_of_its_best_validation(
    tmp_path, watched, keep, measure, best
):
    """Learning at a rate at which it gets worse again; the same bytes as a training of so many steps."""
    words = [*watched, "optim.lr=0.5", "optim.sched.min_lr=0.5"]
    if keep == "best:loss":
        words.append("training.tasks=[]")
    killed, keeps = tmp_path / "killed", f"training.keep={keep}"
    prune(killed, *words)
    process = started("distill", f"workspace={killed}", *words, keeps)
    log = killed / "student" / "state" / "metrics.jsonl"
    until(
        lambda: process.poll() is not None or (log.is_file() and '"step": 7' in log.read_text()),
        every=0.005,
    )
    process.kill()
    process.wait()
    assert newest_checkpoint(killed / "student" / "state" / "nemo" / "checkpoints") is not None
    assert main(["distill", f"workspace={killed}", *words, keeps]) == 0
    kept = json.loads((killed / "student" / "kept.json").read_text())
    values = {line["step"]: line[measure] for line in curve(killed) if measure in line}
    assert kept["value"] == values[kept["step"]] == best(values.values())
    assert kept["measure"] == measure and kept["step"] < max(values)
    assert kept["step"] == min(step for step in values if values[step] == kept["value"])
    short = [f"trainer.max_steps={kept['step']}", "training.tasks=[]"]
    distilled(tmp_path / "short", *words, *short)
    for name, value in weights(tmp_path / "short").items():
        assert torch.equal(value, weights(killed)[name]), name


def test_a_training_ends_early_where_a_task_gets_no_better(tmp_path, watched, capsys):
    """Its patience counts measurements, not the validations between them."""
    words = [
        *watched, "optim.lr=0.5", "optim.sched.min_lr=0.5", "trainer.max_steps=40", "training.task_every=3",
        "training.tasks=[held_out_bytes]", "exp_manager.create_tensorboard_logger=false",
        "+exp_manager.create_early_stopping_callback=true",
        "+exp_manager.early_stopping_callback_params={monitor:'held_out_bytes:bits_per_byte',patience:2,mode:min}",
    ]  # fmt: skip
    student = distilled(tmp_path / "ws", *words)
    stopped = json.loads((student / "stopped.json").read_text())
    name = "held_out_bytes:bits_per_byte"
    values = [line[name] for line in read_log(student / "metrics.jsonl") if name in line]
    assert stopped["reason"] == f"early stopping on {name}"
    assert stopped["step"] == 6 * len(values) < 40
    assert min(values[-2:]) >= min(values[:-2]) and len(values) >= 3
    capsys.readouterr()
    wrong = [word.replace("mode:min", "mode:max") for word in words]
    said = refused(capsys, "distill", f"workspace={tmp_path / 'ws'}", *wrong)
    assert f"{name} is better where it is lower; expected min, found max" in said


def test_what_cannot_be_measured_or_kept_is_refused_before_anything_is_trained(
    tmp_path, watched, capsys
):
    place = f"workspace={tmp_path / 'ws'}"
    prune(tmp_path / "ws", *watched)
    for more, text in (
        ("training.tasks=[held_out_chioce]", "training.tasks: lm-eval knows no task 'held_out_chioce'"),
        ("training.keep=first", "training.keep: expected last, best:loss or best:TASK, found 'first'"),
        ("training.keep=best:hellaswag", "expected a measure of training.tasks (held_out_choice:acc, held"),
        ("training.keep=best:loss training.parallel=shard", "not with training.parallel=shard"),
        ("training.task_every=7", "measured after 14 steps for the first time, and this training ends after 12"),
        ("+trainer.limit_val_batches=0", "this training has no validation"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(["distill", place, *watched, *more.split()]) == 2
        assert (
            text in capsys.readouterr().err.splitlines()[-1]
        )  # data sets show their progress here
    assert not (tmp_path / "ws" / "student").exists()


def test_what_is_looked_at_decides_the_result_only_where_it_is_chosen_by(watched):
    from nemo_minitron.stages.training_stage import _resolved

    def decides(*more):
        section = {"batch_size": 2, "seed": 0, "trainer": {}, "optim": {}}
        return _resolved(load_config("config", [*watched, *more]), section)[1]

    same = decides()
    assert "keep" not in same and same == decides("training.tasks=[]", "training.task_every=1")
    assert decides("training.keep=best:loss") != same
    by_loss = decides("training.keep=best:loss", "training.tasks=[]")
    assert by_loss == decides("training.keep=best:loss", "training.task_limit=3")
    assert by_loss != decides("training.keep=best:loss", "data.validation.samples=4")
    by_task = decides("training.keep=best:held_out_choice")
    assert by_task != decides("training.keep=best:held_out_choice", "training.task_limit=3")


def test_every_checkpoint_finds_the_weights_that_were_best_when_it_was_written(tmp_path):
    folder, state = make_model(tmp_path / "m", "llama"), tmp_path / "state"
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            saved = newest_checkpoint(state / "nemo" / "checkpoints")
            lines = read_log(state / "metrics.jsonl") if trainer.global_step else []
            if saved is not None:
                before = [line for line in lines if line["step"] <= step_of(saved)]
                best = best_line(before, "val_loss", False)
                assert (state / "best" / f"step={best['step']}").is_file()
                seen.append(best["step"])
                assert len(list((state / "best").iterdir())) <= 3

    run(folder, state, 14, [BestWeights("val_loss", False, state), Look()])
    assert len(set(seen)) > 2  # it gets better and better
    assert json.loads((state / "kept.json").read_text())["step"] == 14
