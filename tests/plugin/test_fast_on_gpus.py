"""What a training chooses by itself on a GPU; the choices are made where there is none, too."""

import pytest
import torch

pytest.importorskip("nemo")

from lightning.pytorch import Trainer

from nemo_minitron.losses.intermediate import IntermediateWeights
from nemo_minitron.plugin.fast_on_gpus import FastOnGpus
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.trainer import Options
from tests.support.models import make_model
from tests.support.nemo_training import OPTIM, distillation, run

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


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_gradients_are_clipped_for_one_kernel_too(tmp_path, folder, monkeypatch, precision):
    monkeypatch.setitem(OPTIM, "fused", True)
    fused = run(folder, tmp_path / "fused", 4, gradient_clip_val=0.1, precision=precision)
    monkeypatch.delitem(OPTIM, "fused")
    plain = run(folder, tmp_path / "plain", 4, gradient_clip_val=0.1, precision=precision)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(fused.model.state_dict()[name], value, rtol=1e-4, atol=1e-4)


@pytest.fixture
def quickly(monkeypatch):
    """The layers are compiled for the debugger, not for the processor; the loss is not."""
    whole = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **how: whole(f, **{**how, "backend": "aot_eager"})
    )
    monkeypatch.setattr(FastOnGpus, "compiles_loss", lambda self: False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["plain", "checkpointing", "intermediate"])
def test_a_distillation_whose_layers_are_compiled_learns_the_same(
    tmp_path, folder, quickly, capsys, way
):
    teacher, found = make_model(tmp_path / "teacher", "llama", seed=1), []
    inside = IntermediateWeights(("hidden",), layers=((1, 1),)) if way == "intermediate" else None
    for compiles in ("on", "off"):
        options = Options(way == "checkpointing", compiles)
        learns = distillation(teacher, inside)
        found.append(run(folder, tmp_path / compiles, 4, [learns], options=options))
        for model in (found[-1].model, learns.teacher):  # nothing is left behind
            assert not any("forward" in vars(layer) for layer in model.model.layers)
    for name, value in found[1].model.state_dict().items():
        torch.testing.assert_close(found[0].model.state_dict()[name], value, rtol=1e-4, atol=1e-4)
    told = capsys.readouterr().err
    layers = len(found[0].model.model.layers)
    compiled = layers - 1 if way == "intermediate" else layers
    assert f"training.compile: compiles {compiled} of {layers} layers of the student" in told
    assert (
        told.count("training.compile") == 1
        and torch._dynamo.utils.counters["stats"]["unique_graphs"]
    )
