"""Trainings that are killed, run out of disk or meet bad data: real processes, real signals."""

import json
import random
import re
import resource
import time

import pytest
import torch

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.plugin.trainer import newest_checkpoint, step_of
from nemo_minitron.workspace.training_log import read_log
from tests.support.nemo_training import killed_behind_a_checkpoint
from tests.support.processes import until
from tests.support.runs import prune, refused, started
from tests.support.two_ranks import curve, weights


def test_kills_at_random_times_lose_no_step_that_was_saved(tmp_path, words_often):
    words = [*words_often, "trainer.max_steps=200", "distill.intermediate.terms=[hidden]",
             "distill.intermediate.layers=['-1:-1']", "training.spike_factor=50"]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for place in (straight, killed):
        prune(place, *words)
    state, draw, saved = killed / "student" / "state", random.Random(0), []

    def steps():
        log = state / "metrics.jsonl"
        return log.read_text().count('"loss"') if log.is_file() else 0

    for number in range(7):
        process, aim = started("distill", f"workspace={killed}", *words), steps()
        if number % 4:  # some in the start, most in the training
            aim += draw.randint(4, 20)
            until(lambda aim=aim, it=process: it.poll() is not None or steps() >= aim, every=0.005)
        else:
            time.sleep(draw.uniform(0, 1))
        assert process.poll() is None, "it ended before it was killed as often as it should be"
        process.kill()
        process.wait()
        newest = newest_checkpoint(state / "nemo" / "checkpoints")
        saved.append(-1 if newest is None else step_of(newest))
    assert saved == sorted(saved)
    assert len(set(saved)) > 3, saved  # kills hit the training, not only its start
    for place in (killed, straight):
        assert main(["distill", f"workspace={place}", *words]) == 0
    assert curve(killed) == curve(straight)
    assert all(
        torch.equal(weights(killed)[name], tensor) for name, tensor in weights(straight).items()
    )


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, words_often):
    words = [*words_often, "trainer.max_steps=120"]
    straight, full = tmp_path / "straight", tmp_path / "full"
    for place in (straight, full):
        prune(place, *words)
    folder = full / "student" / "state" / "nemo" / "checkpoints"
    good = killed_behind_a_checkpoint(full, *words)
    content = good.read_bytes()
    cramped = started("distill", f"workspace={full}", *words)
    # the kernel refuses larger files with an error, as a full disk does
    resource.prlimit(cramped.pid, resource.RLIMIT_FSIZE, (len(content) // 2,) * 2)
    _, err = cramped.communicate(timeout=120)
    assert cramped.returncode == 1
    assert "Traceback" not in err
    assert "File too large" in err or "write" in err, err
    assert newest_checkpoint(folder) == good
    assert good.read_bytes() == content
    for place in (full, straight):
        assert main(["distill", f"workspace={place}", *words]) == 0
    assert curve(full) == curve(straight)
    assert all(
        torch.equal(weights(full)[name], tensor) for name, tensor in weights(straight).items()
    )


@pytest.fixture
def spoiled(tmp_path, words_often):
    """A training on sentences among which there is one sample of noise."""
    draw = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(
            "the cat sat on the mat and the dog sat on the log\n" * 4
        )
    (folder / "noise.txt").write_text("".join(draw.choice("{}[]()<>~^%$#@!*;") for _ in range(60)))
    keys = ("source.model", "data.train", "plan", "score", "distill")
    return [
        *[word for word in words_often if not word.startswith(keys)],
        f"data.train.paths=[{folder}]", f"data.validation.paths=[{folder}]", "data.train.sequence_length=16",
        "pretrain.batch_size=1", "trainer.max_steps=150", "optim.lr=0.01", "training.spike_factor=3",
        "training.spike_window=8",
        *[f"+pretrain.model.{entry}" for entry in (
            "model_type=llama", "vocab_size=280", "hidden_size=16", "intermediate_size=32", "num_hidden_layers=1",
            "num_attention_heads=2", "num_key_value_heads=1",
        )],
    ]  # fmt: skip


def test_a_bad_batch_is_left_out_where_that_is_asked_for(capsys, tmp_path, spoiled):
    place = tmp_path / "skip"
    arguments = ["pretrain", f"workspace={place}", *spoiled, "training.on_bad_loss=skip"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    skips = json.loads((place / "pretrain" / "skipped.json").read_text())
    assert skips and all("a spike" in skip["reason"] for skip in skips)
    assert f"150 steps, {len(skips)} left out (skipped.json)" in printed.out
    assert f"step {skips[0]['step']}: the loss is" in printed.err
    losses = [
        line["loss"] for line in read_log(place / "pretrain" / "metrics.jsonl") if "loss" in line
    ]
    assert len(losses) == 150
    late = sorted(losses[30:])
    assert late[-1] < 3.5 * late[len(late) // 2]
    assert main(["verify", str(place)]) == 0
    rows = (place / "pretrain" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,tokens,loss,ce") and len(rows) > 150


@pytest.mark.parametrize("more", ["training.on_bad_loss=stop", "training.max_skips=1"])
def test_a_bad_batch_stops_where_that_is_asked_for(capsys, tmp_path, spoiled, more):
    skip = [] if "stop" in more else ["training.on_bad_loss=skip", "training.spike_factor=1.05"]
    assert main(["pretrain", f"workspace={tmp_path / 'ws'}", *spoiled, more, *skip]) == 1
    assert "a spike: the last 8 steps had" in capsys.readouterr().err
    assert not (tmp_path / "ws" / "pretrain" / "manifest.json").exists()


def test_whoever_is_stopped_by_a_bad_batch_goes_on_without_it(capsys, tmp_path, spoiled):
    place = tmp_path / "ws" / "pretrain"
    often = "exp_manager.checkpoint_callback_params.every_n_train_steps=5"
    words = ["pretrain", f"workspace={tmp_path / 'ws'}", *spoiled, often]
    assert main(words) == 1
    before = read_log(place / "state" / "metrics.jsonl")
    saved = max(int(path.stem.split("=")[1]) for path in place.rglob("step=*.ckpt"))
    assert saved > 1
    capsys.readouterr()
    assert main([*words, "training.on_bad_loss=skip"]) == 0
    assert "other settings" not in capsys.readouterr().err
    after = read_log(place / "metrics.jsonl")
    assert after[:saved] == before[:saved]  # with their tokens per second: those of the first run


def test_what_only_says_how_a_training_works_leaves_it_the_same(monkeypatch, tmp_path, words_often):
    from nemo_minitron.stages.training_stage import _resolved, resolved_trainer

    def recipe(*more, ranks=1):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = load_config("config", [*words_often, "training.validate_every=7", *more])
        section = {"batch_size": 2, "seed": 0, "trainer": {}, "optim": {}}
        return _resolved(config, section)

    one, decides = recipe("trainer.accumulate_grad_batches=4")
    other, again = recipe("trainer.accumulate_grad_batches=2", "training.on_bad_loss=skip", ranks=2)
    assert decides == again and recipe("trainer.accumulate_grad_batches=2")[1] != decides
    intervals = one["trainer"]["val_check_interval"], other["trainer"]["val_check_interval"]
    assert intervals == (28, 14)  # micro-batches
    config = load_config("config", [*words_often, "training.max_tokens=1000000"])
    assert resolved_trainer(config, {"max_steps": 30}, 2)["max_steps"] == 30  # a stage's own word
    assert resolved_trainer(config, {"max_steps": None}, 2)["max_steps"] > 1000


def test_what_is_split_cannot_be_compared(capsys, tmp_path, words_often):
    place = f"workspace={tmp_path / 'ws'}"
    assert main(["prune", place, *words_often]) == 0
    more = [
        "distill.intermediate.terms=[attention]",
        "training.parallel=shard",
        "training.tensor_parallel=2",
    ]
    assert "training.tensor_parallel=2 splits them" in refused(
        capsys, "distill", place, *words_often, *more
    )


def test_a_budget_of_tokens_sets_the_steps_and_the_schedule(tmp_path, words_often):
    words = [*words_often, "training.max_tokens=500"]  # 500 / (2 x 16) = 15.6
    place = tmp_path / "ws"
    prune(place, *words)
    assert main(["distill", f"workspace={place}", *words]) == 0
    lines = [line for line in read_log(place / "student" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["step"] == 16 and lines[-1]["tokens"] == 512
    assert lines[-1]["lr"] < 0.2 * max(line["lr"] for line in lines)


def test_a_step_of_more_samples_than_the_text_yields_is_refused_at_once(tmp_path, words, capsys):
    """Also by 'minitron logits', whose pass would be for nothing."""
    place = f"workspace={tmp_path / 'ws'}"
    assert main(["prune", place, *words]) == 0
    many = [*words, "data.train.samples=40", "distill.batch_size=16"]
    for stage in ("distill", "logits"):
        capsys.readouterr()
        said = refused(capsys, stage, place, *many, "trainer.accumulate_grad_batches=4")
        assert "data.train: a step takes 64 samples (batch_size, times accumulate_" in said
        assert "the text yields 40 of 16 tokens; use a smaller batch_size" in said


def test_text_that_is_read_again_and_again_is_said_so(tmp_path, words, capsys):
    (tmp_path / "short.txt").write_text("the model reads a file and writes the answer. " * 15)
    words = [*words, f"data.train.paths=[{tmp_path / 'short.txt'}]", "data.train.samples=null"]
    words += ["data.holdout=0.2", "data.validation.samples=2", f"workspace={tmp_path / 'ws'}"]
    assert main(["prune", *words]) == 0
    assert main(["distill", *words]) == 0
    said = capsys.readouterr().err
    assert re.search(
        r"the text yields \d\d samples of 16 tokens, each of which is read \d\.\d times", said
    ), said
