"""On an accelerator a step is judged when its numbers have come: nothing bad reaches a file all the same."""

import math

import pytest
import torch

pytest.importorskip("nemo")

from lightning.pytorch import Callback

from nemo_minitron.plugin.live_teacher import Publishing
from nemo_minitron.plugin.trainer import Options, newest_checkpoint
from nemo_minitron.training.late_reads import LateRead
from nemo_minitron.training.loss_guard import BadStep, Spikes
from nemo_minitron.workspace.training_log import read_log
from tests.support import accelerator
from tests.support.accelerator import NAME
from tests.support.models import make_model
from tests.support.nemo_training import run

HOW = {"accelerator": NAME, "strategy": NAME, "log_every_n_steps": 100, "val_check_interval": 100}


class Poison(Callback):
    """Spoils the weights before a step, and notes which step was begun last."""

    def __init__(self, step, factor=float("nan")):
        self.step, self.factor, self.begun = step, factor, -1

    def on_train_batch_start(self, trainer, module, *_):
        self.begun = trainer.global_step
        if trainer.global_step == self.step:
            with torch.no_grad():
                module.model.lm_head.weight.mul_(self.factor)


# checkpoints are written behind every third step
CASES = {
    "another step": (3, 4, {}),
    "a checkpoint": (5, 5, {}),
    "a validation": (3, 3, {"val_check_interval": 4}),
    "a line in the log": (3, 3, {"log_every_n_steps": 4}),
    "the end": (7, 7, {}),
}


@pytest.mark.parametrize("behind", CASES)
def test_a_bad_step_ends_the_training_before_what_comes_behind_it(tmp_path, behind):
    bad, begun, changes = CASES[behind]
    poison, folder = Poison(bad), make_model(tmp_path / "m", "llama")
    with accelerator.accelerator(), pytest.raises(BadStep, match=f"step {bad + 1}: ") as raised:
        run(folder, tmp_path / "state", 8, [poison], **{**HOW, **changes})
    assert raised.value.step == bad and poison.begun == begun
    newest = newest_checkpoint(tmp_path / "state" / "nemo" / "checkpoints")
    saved = torch.load(newest, weights_only=False)
    assert saved["global_step"] == (6 if bad > 5 else 3)
    assert all(value.held.isfinite().all() for value in saved["state_dict"].values())
    lines = read_log(tmp_path / "state" / "metrics.jsonl")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert not [line for line in lines if line["step"] > bad or "val_loss" in line]


def test_a_bad_model_is_not_published(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    with accelerator.accelerator(), pytest.raises(BadStep, match="step 2: "):
        run(folder, tmp_path / "state", 8, [Poison(1), Publishing(tmp_path / "live", 2)], **HOW)
    assert not (tmp_path / "live").exists()


def test_a_spike_is_named_by_its_own_step(tmp_path):
    folder, options = make_model(tmp_path / "m", "llama"), Options(spikes=Spikes(3.0, 3))
    with (
        accelerator.accelerator(),
        pytest.raises(BadStep, match="a spike: the last 3 steps") as raised,
    ):
        run(folder, tmp_path / "state", 9, [Poison(6, 30)], options=options, **HOW)
    assert raised.value.step == 6


def test_late_numbers_are_those_of_their_time():
    values = torch.tensor([1.0, float("inf")])
    with accelerator.accelerator():
        there = values.to(NAME)
        late = LateRead(there)
        there.zero_()
        assert late.values() == [1.0, float("inf")]
