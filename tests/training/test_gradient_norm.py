"""The norm of a step's gradients is measured once, behind everybody who changes them; guard and clipping share it."""

import contextlib

import pytest
import torch

pytest.importorskip("nemo")

from lightning.pytorch import Callback, LightningModule

from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.training import loss_guard
from nemo_minitron.training.loss_guard import BadStep
from tests.support import accelerator
from tests.support.accelerator import NAME
from tests.support.models import make_model
from tests.support.nemo_training import run


class Times(Callback):
    """A user's callback: multiplies the gradients of some steps."""

    def __init__(self, factor, steps=range(100)):
        self.factor, self.steps = factor, steps

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step in self.steps:
            for weight in module.parameters():
                weight.grad.mul_(self.factor)


@pytest.mark.parametrize("clip", [{"gradient_clip_val": 0.05},
                                  {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, {}])  # fmt: skip
def test_clipped_is_what_lightning_would_clip_to_the_bit(tmp_path, monkeypatch, clip):
    folder, changed = make_model(tmp_path / "m", "llama"), [Times(3.0, (1,)), Times(0.1, (2,))]
    ours = run(folder, tmp_path / "ours", 4, changed, **clip).state_dict()
    own = LightningModule.configure_gradient_clipping
    monkeypatch.setattr(MinitronModel, "configure_gradient_clipping", own)
    theirs = run(folder, tmp_path / "theirs", 4, changed, **clip).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("where", ["cpu", NAME])
def test_a_gradient_that_somebody_spoils_ends_the_training_by_its_step(tmp_path, where):
    there = {} if where == "cpu" else {"accelerator": NAME, "strategy": NAME}
    folder = make_model(tmp_path / "m", "llama")
    spoiled = [Times(torch.inf, (2,))]
    with (
        accelerator.accelerator() if there else contextlib.nullcontext(),
        pytest.raises(BadStep, match=r"step 3: the gradient is (inf|nan)") as raised,
    ):
        run(folder, tmp_path / "state", 6, spoiled, gradient_clip_val=1.0, **there)
    assert raised.value.step == 2


@pytest.mark.parametrize("clip", [{"gradient_clip_val": 1.0}, {}])
def test_it_is_measured_once_a_step(tmp_path, monkeypatch, clip):
    measured, norm = [], torch.nn.utils.get_total_norm

    def counted(*given, **more):
        measured.append(norm(*given, **more))
        return measured[-1]

    monkeypatch.setattr(loss_guard.torch.nn.utils, "get_total_norm", counted)
    monkeypatch.setattr("torch.nn.utils.clip_grad._get_total_norm", counted)
    run(make_model(tmp_path / "m", "llama"), tmp_path / "state", 3, **clip)
    assert len(measured) == 3
