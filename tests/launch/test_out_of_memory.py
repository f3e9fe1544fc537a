"""Less memory, the same artifact: micro-batches are halved, what decides the result is not touched."""

import functools
import importlib

import pytest

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import as_dict, from_dict, load_config
from nemo_minitron.launch.out_of_memory import (
    _BATCHES,
    FILE,
    note_memory,
    with_halved_micro_batch,
    with_smaller_micro_batch,
)
from nemo_minitron.stages.run import SEVERAL, STAGES
from nemo_minitron.stages.training_stage import _resolved


def values(*overrides):
    return as_dict(
        load_config("config", ["distill.batch_size=8", "score.batch_size=3", *overrides])
    )


def section(config, stage):
    from dataclasses import asdict

    own = {"distill": config.distill, "correct": config.correct, "pretrain": config.pretrain}[stage]
    return {"trainer": {}, "optim": {}, **asdict(own)}


@pytest.mark.parametrize("stage", ["distill", "correct", "pretrain"])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("trainer.accumulate_grad_batches=3",),
        ("+pretrain.trainer.accumulate_grad_batches=5",),
        ("+trainer.limit_val_batches=3",),
    ],
)
def test_a_training_stays_the_same_training(stage, more):
    before = values(*more)
    after = with_halved_micro_batch(stage, before, 2)
    assert before == values(*more)  # not touched
    one, two = from_dict(before), from_dict(after)
    (first, decided), (second, decided_too) = (_resolved(c, section(c, stage)) for c in (one, two))
    assert decided == decided_too
    assert second["batch_size"] * 4 == first["batch_size"] == 8
    accumulate = [resolved["trainer"]["accumulate_grad_batches"] for resolved in (first, second)]
    assert accumulate[1] == 4 * accumulate[0]
    if more == ("+trainer.limit_val_batches=3",):  # the same samples
        assert [resolved["trainer"]["limit_val_batches"] for resolved in (first, second)] == [3, 12]


def test_where_validations_of_a_number_of_batches_decide_there_is_no_smaller_try():
    limited = "+trainer.limit_val_batches=3"
    for deciding in ("training.keep=best:loss", "+exp_manager.create_early_stopping_callback=true"):
        assert with_halved_micro_batch("distill", values(limited, deciding)) is None
        assert with_halved_micro_batch("distill", values(deciding)) is not None
        assert (
            with_halved_micro_batch("distill", values(deciding, f"{limited[:-1]}0.5")) is not None
        )


def test_there_is_an_end_to_it():
    assert with_halved_micro_batch("distill", values(), 3) is not None
    assert with_halved_micro_batch("distill", values(), 4) is None
    assert (
        with_halved_micro_batch("distill", values("distill.batch_size=6"), 2) is None
    )  # 3 samples: no half
    assert with_halved_micro_batch("score", values())["score"]["batch_size"] == 1
    assert with_halved_micro_batch("score", values(), 2) is None
    assert with_halved_micro_batch("prune", values()) is None
    # a number of micro-batches is part of the recipe, and would be half as many steps; a share is not
    assert with_halved_micro_batch("distill", values("+trainer.limit_train_batches=4")) is None
    assert (
        with_halved_micro_batch("correct", values("+correct.trainer.limit_train_batches=4")) is None
    )
    for more in ("+trainer.limit_train_batches=0.5", "+correct.trainer.limit_train_batches=4"):
        assert with_halved_micro_batch("distill", values(more)) is not None


@pytest.mark.parametrize("stage", sorted({*SEVERAL, *_BATCHES}))
def test_every_stage_has_less_to_try_with_what_is_set_by_default(tmp_path, stage):
    config = as_dict(load_config("config", []))
    assert note_memory(tmp_path, stage, config)
    lighter, times = with_smaller_micro_batch(tmp_path, stage, config)
    section = functools.reduce(dict.__getitem__, _BATCHES[stage].split("."), lighter)
    assert (times, section["batch_size"]) == (1, 4)
    from_dict(lighter)


def test_what_was_noted_of_a_number_holds_for_auto(tmp_path):
    assert note_memory(tmp_path, "score", values("score.batch_size=16"))
    lighter, _ = with_smaller_micro_batch(tmp_path, "score", values("score.batch_size=auto"))
    assert lighter["score"]["batch_size"] == 4


def test_it_is_remembered_for_the_next_try_and_the_next_run(tmp_path):
    config = values()
    assert with_smaller_micro_batch(tmp_path, "distill", config) == (config, 0)
    assert note_memory(tmp_path, "distill", config) and note_memory(tmp_path, "distill", config)
    lighter, times = with_smaller_micro_batch(tmp_path, "distill", config)
    assert (
        times,
        lighter["distill"]["batch_size"],
        lighter["trainer"]["accumulate_grad_batches"],
    ) == (
        2,
        2,
        4,
    )
    assert with_smaller_micro_batch(tmp_path, "score", config) == (config, 0)
    assert note_memory(tmp_path, "distill", config)
    assert not note_memory(tmp_path, "distill", config)  # one sample is one sample
    (tmp_path / FILE).write_text("not json")
    assert with_smaller_micro_batch(tmp_path, "distill", config) == (config, 0)


@pytest.mark.parametrize("stage", ["screen", "sensitivity"])
def test_what_is_screened_in_smaller_batches_is_the_same_artifact(stage, tmp_path, teacher, corpus):
    words = [
        f"workspace={tmp_path}", f"source.model={teacher}", f"data.train.paths=['{corpus}']",
        "data.holdout=0.2", "data.validation.sequence_length=16", "data.validation.samples=8",
        "score.importance=magnitude",
    ]  # fmt: skip
    assert main(["score", *words]) == 0
    budget = ["plan.budget.params=15000", "plan.budget.tolerance=0.15"]
    config = load_config("config", [*words, *(budget if stage == "screen" else [])])
    assert note_memory(tmp_path, stage, as_dict(config))
    lighter = from_dict(with_smaller_micro_batch(tmp_path, stage, as_dict(config))[0])
    assert (config.evaluate.batch_size, lighter.evaluate.batch_size) == (8, 4)
    made = importlib.import_module(STAGES[stage])
    first, second = made.recipe(config), made.recipe(lighter)
    assert (first.settings, first.inputs) == (second.settings, second.inputs)
