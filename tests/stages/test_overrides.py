"""Overrides of NeMo's exp_manager and Lightning's Trainer in real trainings: what they write, and how they end."""

import json

import pytest
import torch

from nemo_minitron.cli.main import main
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.trainer import newest_checkpoint
from nemo_minitron.workspace.training_log import read_log
from tests.support.runs import refused
from tests.support.two_ranks import weights

SAVED = "exp_manager.checkpoint_callback_params"


@pytest.fixture(scope="module")
def start(tmp_path_factory, teacher, corpus):
    """A function that gives the words of a distillation in a workspace that is ready for it."""

    def give(name):
        place = tmp_path_factory.mktemp(name)
        words = [
            f"workspace={place}", f"source.model={teacher}", f"data.train.paths=[{corpus}]",
            "data.train.sequence_length=16", "data.validation.sequence_length=16", "data.validation.samples=8",
            "score.importance=magnitude", "plan.ffn=20", "trainer.max_steps=6", "trainer.val_check_interval=2",
            "trainer.accelerator=cpu", "optim.sched.warmup_steps=1", "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false", "distill.batch_size=2", f"{SAVED}.every_n_train_steps=100",
        ]  # fmt: skip
        assert main(["prune", *words]) == 0
        return place, words

    return give


def test_what_loggers_write_and_archives_outlive_the_stage(start, capsys):
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    place, words = start("logs")
    logs = place / "student" / "logs"
    words += ["exp_manager.create_tensorboard_logger=true", "+exp_manager.name=mine"]
    cut = [*words, "+exp_manager.max_time_per_run={microseconds: 1}"]
    assert main(["distill", *cut]) == 143
    said = capsys.readouterr().err
    assert (
        "stopped by exp_manager.max_time_per_run at step 1 of 6, which is saved; run it again"
        in said
    )
    checkpoints = place / "student" / "state" / "nemo" / "checkpoints"
    assert newest_checkpoint(checkpoints).name == "step=1.ckpt"
    more = [f"{SAVED}.save_nemo_on_train_end=true", "exp_manager.create_wandb_logger=true",
            "+exp_manager.wandb_logger_kwargs={project: p, offline: true}"]  # fmt: skip
    try:
        assert main(["distill", *words, *more]) == 0
        (run,) = logs.glob("wandb/offline-run-*/run-*.wandb")
        size = run.stat().st_size
    finally:
        wandb.teardown()  # its process works for all runs of this one
    assert len(list(logs.glob("events.out.tfevents.*"))) == 2  # of both runs
    assert run.stat().st_size == size > 0  # it was whole already
    assert sorted(path.name for path in logs.rglob("*.ckpt")) == []
    restored = MinitronModel.restore_from(str(logs / "mine.nemo"))
    for name, tensor in weights(place).items():
        assert torch.equal(restored.model.state_dict()[name], tensor), name
    steps = [
        line["step"] for line in read_log(place / "student" / "metrics.jsonl") if "loss" in line
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    (logs / "notes.txt").write_text("of the user")
    (logs / "mine.nemo").unlink()  # logs are the user's to do with as they like
    assert main(["verify", str(place)]) == 0 and main(["distill", *words]) == 0
    assert main(["clean", str(place), "--yes"]) == 0 and run.stat().st_size == size
    capsys.readouterr()
    assert main(["distill", *words, "optim.lr=0.01", "trainer.max_steps=1"]) == 0
    assert not run.exists() and "that is kept in" in capsys.readouterr().err
    assert main(["distill", *words]) == 0 and run.is_file() and (logs / "notes.txt").is_file()
    assert main(["verify", str(place)]) == 0


def test_without_a_logger_an_artifact_is_what_it_was(start, capsys):
    place, words = start("plain")
    assert main(["distill", *words, "trainer.max_steps=1"]) == 0
    names = {path.name for path in (place / "student").iterdir()}
    assert names == {"hf", "manifest.json", "metrics.csv", "metrics.jsonl"}
    capsys.readouterr()
    for wrong in ("+trainer.max_stps=3", "+trainer.fast_dev_run=true", "trainer.devices=2"):
        told = refused(capsys, "distill", *words, wrong)  # before what is there gives way
        assert f"trainer.{wrong.split('.')[1].split('=')[0]}: " in told
    assert {path.name for path in (place / "student").iterdir()} == names
    logged = "it logs val_loss, val_divergence, train_loss, train_ce, train_divergence, learning_rate, global_step"
    early = ["exp_manager.create_early_stopping_callback=true"]
    for more, told in (
        ([*early, "exp_manager.early_stopping_callback_params.monitor=val_los"], "no 'val_los'; it logs val_loss"),
        ([f"++{SAVED}.monitor=val_acc"], "no 'val_acc'; it logs val_loss"),
        ([f"++{SAVED}.monitor=train_alpha"], f"no 'train_alpha'; {logged}, step, epoch"),
        ([*early, "trainer.limit_val_batches=0"], "no 'val_loss'; it logs train_loss"),
    ):  # fmt: skip
        more = [f"++{word.removeprefix('++')}" for word in more]
        assert told in refused(capsys, "distill", *words, *more)
    assert {path.name for path in (place / "student").iterdir()} == names


def test_early_stopping_ends_a_stage_with_a_result_of_its_own(start, capsys):
    place, words = start("early")
    stopping = ["+exp_manager.create_early_stopping_callback=true",
                "+exp_manager.early_stopping_callback_params={patience: 1, min_delta: 100}"]  # fmt: skip
    assert main(["distill", *words, *stopping]) == 0
    assert (
        "4 of 6 steps, ended by early stopping on val_loss, held-out loss"
        in capsys.readouterr().out
    )
    stop = json.loads((place / "student" / "stopped.json").read_text())
    assert stop == {"step": 4, "reason": "early stopping on val_loss"}
    assert main(["verify", str(place)]) == 0 and main(["distill", *words, *stopping]) == 0
    assert "ended by early stopping" in capsys.readouterr().out
    assert main(["distill", *words]) == 0  # another recipe: without it all steps are taken
    out = capsys.readouterr().out
    assert "6 steps, held-out loss" in out and "ended by" not in out
    assert not (place / "student" / "stopped.json").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["+trainer.max_time={microseconds: 1}"], "1 of 6 steps, ended by trainer.max_time"),
        (["+trainer.max_epochs=2", "data.train.samples=5"], "5 steps, held-out"),
        (["+trainer.max_epochs=2", "data.train.samples=50", "+trainer.limit_train_batches=2"],
         "4 of 6 steps, ended by trainer.max_epochs=2"),
    ],
)  # fmt: skip
def test_whichever_comes_first_ends_a_training(start, capsys, more, told):
    place, words = start("first")
    assert main(["distill", *words, *more]) == 0
    assert told in capsys.readouterr().out
    assert main(["verify", str(place)]) == 0


def test_callbacks_and_a_strategy_of_a_configuration_are_made_as_nemo_makes_them(start, capsys):
    pytest.importorskip("tensorboard")
    place, words = start("made")
    pytorch = "lightning.pytorch"
    own = [f"+trainer.callbacks=[{{_target_: {pytorch}.callbacks.LearningRateMonitor, logging_interval: step}}]",
           f"+trainer.strategy={{_target_: {pytorch}.strategies.DDPStrategy, find_unused_parameters: true}}",
           "exp_manager.create_tensorboard_logger=true"]  # fmt: skip
    own = [f"++{word.lstrip('+')}" for word in own]
    assert main(["distill", *words, "trainer.max_steps=2", *own]) == 0
    (events,) = (place / "student" / "logs").glob("events.out.tfevents.*")
    assert b"lr-AdamW" in events.read_bytes()
    capsys.readouterr()
    assert main(["distill", *words, "trainer.max_steps=2"]) == 0  # they decide nothing
    assert "already done" in capsys.readouterr().out
    wrong = f"++trainer.callbacks=[{{_target_: {pytorch}.callbacks.LearningRateMonitor, often: 1}}]"
    told = refused(capsys, "distill", *words, "trainer.max_steps=3", wrong)
    assert "trainer.callbacks: Error in call to target" in told and "argument 'often'" in told
