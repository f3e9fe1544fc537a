"""What a training chooses by itself on a GPU; the choices are made where there is none, too."""

import pytest
import torch

pytest.importorskip("nemo")

from lightning.pytorch import Trainer

from nemo_minitron.plugin.model import MinitronModel
from tests.support.models import make_model
from tests.support.nemo_training import OPTIM

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m") / "m", "llama")


def model_on(device, folder, optim, precision="bf16-mixed"):
    trainer = Trainer(
        accelerator="cpu", max_steps=3, precision=precision, logger=False, barebones=True
    )
    trainer.strategy._root_device = device  # whose weights stay here until a training begins
    return MinitronModel.from_hf(folder, optim, trainer=trainer)


@pytest.mark.parametrize(
    ("optim", "fused"),
    [
        ({**OPTIM}, True),
        ({**OPTIM, "fused": False}, False),
        ({**OPTIM, "foreach": True}, None),
        ({**OPTIM, "name": "sgd"}, None),
        ({"name": "novograd", "lr": 1e-3}, None),
    ],
)
def test_one_kernel_does_a_step_of_adam_on_cuda_if_nothing_else_is_said(folder, optim, fused):
    model = model_on(CUDA, folder, optim)
    model.setup_optimization()
    assert model._optimizer.defaults.get("fused") is fused
    assert "fused" not in model.cfg.optim or "fused" in optim  # no archive knows of this machine


def test_not_on_the_cpu(folder):
    model = model_on(torch.device("cpu"), folder, OPTIM)
    model.setup_optimization()
    assert model._optimizer.defaults["fused"] is None
    assert not model._for_device()["pin_memory"]
    assert model_on(CUDA, folder, OPTIM)._for_device()["pin_memory"]


def test_a_checkpoint_of_another_machine_does_not_choose(folder):
    for device, saved, chosen in ((CUDA, None, True), ("cpu", True, None), ("cpu", None, None)):
        model = model_on(torch.device(device), folder, OPTIM)
        checkpoint = {"optimizer_states": [{"param_groups": [{"fused": saved}]}]}
        model.choose_kernels(checkpoint)
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["fused"] is chosen
