"""The gradient of a step is that of the mean over its tokens, whatever lengths its micro-batches have."""

import contextlib

import pytest
import torch

pytest.importorskip("nemo")

from lightning.pytorch import Callback

from nemo_minitron.models.causal_lm import load_model
from tests.support import accelerator
from tests.support.accelerator import NAME
from tests.support.models import make_model
from tests.support.ragged_batches import FOUR, by_hand, fitted, moved, rows_of, script
from tests.support.two_ranks import module_on_two_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("ragged") / "m", "llama")


def check(folder, found, steps, clip=None):
    """Against weights that plain torch has moved."""
    before = load_model(folder, dtype=torch.float32).state_dict()
    theirs = moved(before, by_hand(folder, steps, clip))
    ours = moved(before, {name: found[name].to("cpu") for name in before})
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("where", ["cpu", NAME])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    ("lengths", "accumulate", "steps"),
    [
        pytest.param((33, 5), 2, [(0, 1)], id="a long row before a short one"),
        pytest.param((5, 33), 2, [(0, 1)], id="a short one before a long one"),
        pytest.param((33, 5, 9), 2, [(0, 1), (2,)], id="the last step of an epoch is a shorter one"),
        pytest.param((17, 17), 4, [(0, 1)], id="an epoch is shorter than a step"),
        pytest.param((-33, 9), 2, [(0, 1)], id="nothing to learn in the first row"),
    ],
)  # fmt: skip
def test_every_token_of_a_step_weighs_the_same(folder, lengths, accumulate, steps, clip, where):
    rows, there = (
        rows_of(*lengths),
        {} if where == "cpu" else {"accelerator": NAME, "strategy": NAME},
    )
    with accelerator.accelerator() if there else contextlib.nullcontext():
        model = fitted(
            script(folder),
            rows,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            **there,
        )
        found = {name: value.detach().to("cpu") for name, value in model.model.state_dict().items()}
    check(folder, found, [[rows[number] for number in step] for step in steps], clip)


def test_a_step_that_a_training_ended_in_is_no_part_of_the_next_training(folder):
    class End(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    rows = rows_of(*FOUR)
    model = fitted(script(folder), rows[:3], accumulate_grad_batches=4, callbacks=[End()])
    before = load_model(folder, dtype=torch.float32).state_dict()
    assert not moved(before, model.model.state_dict()).any()
    fitted(model, rows[2:], accumulate_grad_batches=2)
    check(folder, model.model.state_dict(), [rows[2:]])


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("shard", marks=pytest.mark.slow)])
def test_two_ranks_have_the_gradient_of_one(folder, tmp_path, strategy):
    module_on_two_ranks("tests.support.ragged_batches", tmp_path / "hf", folder, strategy)
    found = load_model(tmp_path / "hf", dtype=torch.float32).state_dict()
    check(folder, found, [rows_of(*FOUR)])
