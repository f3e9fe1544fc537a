"""Trainings in phases: other lengths, texts and rates, killed between and within them."""

import pytest
import torch

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.plugin.trainer import newest_checkpoint, step_of
from nemo_minitron.stages import distill
from nemo_minitron.workspace.manifest import fingerprint
from nemo_minitron.workspace.training_log import read_log
from tests.support.processes import until
from tests.support.runs import prune, refused, started
from tests.support.two_ranks import curve, weights


@pytest.fixture
def texts(tmp_path, words_often):
    """A training of 30 steps of 2 samples with 16 tokens, saved often."""
    return [
        *words_often, "trainer.max_steps=30", "training.validate_every=8", "optim.lr=0.01",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=3", "optim.sched.min_lr=0.01",
        "optim.sched.warmup_steps=0",
    ]  # fmt: skip


PHASES = "training.phases=[{share:0.5},{share:0.4,sequence_length:32,lr:0.001},{share:0.1}]"


def lines_of(place):
    return [line for line in read_log(place / "student" / "metrics.jsonl") if "loss" in line]


def test_a_training_killed_in_its_second_phase_ends_with_the_bytes_of_one_that_was_not(
    tmp_path, texts
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        prune(place, *texts)
    process = started("distill", f"workspace={killed}", *texts, PHASES)
    log = killed / "student" / "state" / "metrics.jsonl"
    until(
        lambda: process.poll() is not None or (log.is_file() and '"step": 19' in log.read_text()),
        every=0.005,
    )
    process.kill()
    process.wait()
    saved = newest_checkpoint(killed / "student" / "state" / "nemo" / "checkpoints")
    assert saved is not None and step_of(saved) >= 18  # of the second phase
    for place in (killed, whole):
        assert main(["distill", f"workspace={place}", *texts, PHASES]) == 0
    assert curve(killed) == curve(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(killed)[name]), name
    lines = lines_of(whole)
    assert len(lines) == 24  # 15, 6 of the double length, 3
    tokens = [line["tokens"] for line in lines]
    assert tokens == [*range(32, 481, 32), *range(544, 865, 64), 896, 928, 960]
    # the rate of the step that comes next, as everywhere
    rates = [0.01] * 14 + [0.001] * 6 + [0.01] * 4
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert len(list((whole / "tokens").glob("[!.]*"))) == 1  # one text, tokenised once


def recipe_of(words, *more):
    recipe = distill.recipe(load_config("config", [*words, *more]))
    return fingerprint(recipe.kind, recipe.settings, recipe.inputs)


def test_which_text_each_phase_reads_is_part_of_the_recipe(tmp_path, texts, corpus):
    """The inputs name each text once: the same for schedules that read other phases of it."""
    b = tmp_path / "b.txt"
    b.write_text("another text " * 50)
    held_out = f"data.validation.paths=[{sorted(corpus.iterdir())[0]}]"
    words = [f"workspace={tmp_path / 'ws'}", *texts, held_out]
    prune(tmp_path / "ws", *texts, held_out)
    own, plain = f"{{share:0.3,paths:[{b}]}}", "{share:0.3}"
    schedules = [(own, plain), (own, own), (plain, own), (plain, plain)]
    found = [
        recipe_of(words, f"training.phases=[{{share:0.4}},{second},{third}]")
        for second, third in schedules
    ]
    assert len(set(found)) == 4
    mixed = [*words, f"data.train.paths=[{corpus},{b}]", "data.train.weights=[1,1]"]
    found = [
        recipe_of(
            mixed, f"training.phases=[{{share:0.9}},{{share:0.1,paths:[{paths}],weights:[3,1]}}]"
        )
        for paths in (f"{corpus},{b}", f"{b},{corpus}")
    ]
    assert len(set(found)) == 2


def test_what_early_stopping_looks_at_is_part_of_the_recipe(tmp_path, texts):
    words = [f"workspace={tmp_path / 'ws'}", *texts]
    prune(tmp_path / "ws", *texts)
    early = [
        "+exp_manager.create_early_stopping_callback=true",
        "+exp_manager.early_stopping_callback_params={patience:2}",
    ]
    small, large = "data.validation.samples=4", "data.validation.samples=512"
    assert recipe_of(words, *early, small) != recipe_of(words, *early, large)
    assert recipe_of(words, small) == recipe_of(words, large)  # nothing looks at them
    assert (
        "validation"
        not in distill.recipe(
            load_config("config", [*words, *early, large, "data.validation.sequence_length=1024"])
        ).settings["early_stopping"]
    )  # the defaults: what was made before this was part of it stays


def test_one_phase_of_everything_is_the_training_without_phases(tmp_path, texts):
    for name, more in (("without", []), ("one", ["training.phases=[{share:1}]"])):
        prune(tmp_path / name, *texts)
        assert main(["distill", f"workspace={tmp_path / name}", *texts, *more]) == 0
    for name, value in weights(tmp_path / "without").items():
        assert torch.equal(value, weights(tmp_path / "one")[name]), name
    assert curve(tmp_path / "without") == curve(tmp_path / "one")


def test_a_phase_reads_a_mixture_of_its_own(tmp_path, texts, corpus):
    other = tmp_path / "other.txt"
    other.write_text("zebra quilt fjord vex. " * 200)
    words = [*texts, f"data.validation.paths=[{corpus}]", "training.max_tokens=320"]
    mixed = (
        "training.phases=[{share:0.6},{share:0.4,weights:[1,3],paths:['"
        + f"{corpus}','{other}"
        + "']}]"
    )
    place = tmp_path / "ws"
    prune(place, *words)
    assert main(["distill", f"workspace={place}", *words, mixed]) == 0
    losses = [line["loss"] for line in lines_of(place)]
    assert len(losses) == 10
    from nemo_minitron.stages.training_stage import training_inputs

    config = load_config("config", [*words, mixed, f"workspace={place}"])
    plain = load_config("config", [*words, f"workspace={place}"])
    assert len(training_inputs(config)) == len(training_inputs(plain)) + 1


def test_phases_that_do_not_fit_are_refused(tmp_path, texts, capsys, corpus):
    place = f"workspace={tmp_path / 'ws'}"
    prune(tmp_path / "ws", *texts)
    capsys.readouterr()
    for more, text in (
        ("training.phases=[{share:0.5},{share:0.4}]", "expected shares that add up to 1, found 0.9"),
        ("training.phases=[{share:2}]", "training.phases[0].share: expected at most 1, found 2.0"),
        ("training.phases=[{share:0.99},{share:0.01}]", "training.phases[1].share: 0.01 of 960 tokens is less"),
        ("training.phases=[{share:1,length:3}]", "a phase has no 'length'; there are: share, sequence_"),
        (f"training.phases=[{{share:1,paths:['{corpus}']}}]", "training.phases[0]: reads a mixture of its own"),
        ("training.phases=[{share:1,weights:[1]}]", "name data.validation.paths"),
        ("training.phases=[{share:1}] distill.teacher_logits=cache", "not with distill.teacher_logits=cache"),
        ("training.phases=[{share:1}] +trainer.max_epochs=2", "are shares of tokens"),
    ):  # fmt: skip
        stage = "logits" if "cache" in more else "distill"
        assert text in refused(capsys, stage, place, *texts, *more.split())


def test_a_training_without_phases_has_the_fingerprint_that_it_had(texts):
    from nemo_minitron.stages.training_stage import _resolved

    section = {"batch_size": 2, "seed": 0, "trainer": {}, "optim": {}}
    plain, phased = (
        _resolved(load_config("config", [*texts, *more]), section)[1] for more in ([], [PHASES])
    )
    assert plain["training"] == {} and plain["trainer"]["max_steps"] == 30
    assert phased["training"]["phases"][1] == {"share": 0.4, "sequence_length": 32, "lr": 0.001}
    assert phased["trainer"]["max_steps"] == 24
