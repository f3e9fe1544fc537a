"""Pruning in memory gives what the stream gives."""

import pytest
import torch

pytest.importorskip("nemo")

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.nemo_archive import nemo_archive
from nemo_minitron.plugin.transforms import DepthPruning, Pruning, WidthPruning
from nemo_minitron.proofs.proof import TOGETHER, halved
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.plan_file import make_plan, read_plan, write_plan
from nemo_minitron.pruning.select import score_shape, select_units
from nemo_minitron.scoring.importance import random_scores
from tests.support.models import logits, make_model, stream


def plan_for(folder, layers=(0, 2)):
    checkpoint = open_checkpoint(folder)
    sizes = checkpoint.architecture.sizes
    torch.manual_seed(0)
    scores = {"hidden": torch.rand(24), "ffn": torch.rand(3, 40), "heads": torch.rand(3, 6)}
    targets = {**sizes, "hidden": 12, "ffn": 17, "heads": 3}
    keep = select_units(checkpoint.family, scores, sizes, targets)
    return checkpoint, make_plan(checkpoint.architecture, keep, layers)


def streamed(checkpoint, plan, folder):
    return logits(stream(checkpoint.folder, folder, plan.keep, plan.layers_kept))


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_is_pruned_in_memory_as_on_disk(tmp_path, name):
    """Also where transformers fuses experts or renames modules in memory, and where a constant is folded."""
    family = families()[name]
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    sizes, axes = checkpoint.architecture.sizes, checkpoint.architecture.present
    targets = halved(family, sizes, TOGETHER, [axis for axis in family.prunable if axis in axes])
    scores = {axis: random_scores(score_shape(family, sizes, axis), 0) for axis in family.prunable}
    keep = select_units(family, scores, sizes, {k: v for k, v in targets.items() if k != "layers"})
    plan = make_plan(checkpoint.architecture, keep, (1, 3))
    expected = logits(stream(folder, tmp_path / "pruned", keep, (1, 3)))
    model = load_model(folder, torch.float32)
    assert Pruning(plan)(model) is model
    assert torch.equal(model(torch.arange(20)[None]).logits, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_in_place_equals_the_stream_and_trains(tmp_path, name, tied):
    folder = make_model(tmp_path / "m", name, tie_word_embeddings=tied)
    checkpoint, plan = plan_for(folder)
    expected = streamed(checkpoint, plan, tmp_path / "pruned")
    model = load_model(folder)
    same = Pruning(plan)(model)
    assert same is model
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, expected)
    assert sum(p.numel() for p in model.parameters()) == plan.cost_after.parameters
    model.train()(tokens).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_width_then_depth_is_both_at_once_and_a_nemo_model_is_looked_into(tmp_path):
    folder = make_model(tmp_path / "m", "nemotron")
    checkpoint, plan = plan_for(folder)
    expected = streamed(checkpoint, plan, tmp_path / "pruned")
    wrapped = MinitronModel.from_hf(folder).eval()
    DepthPruning(plan)(WidthPruning(plan)(wrapped))
    assert torch.equal(wrapped.model(torch.arange(20)[None]).logits, expected)


def test_a_plan_on_disk_and_a_plan_for_another_model(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    (tmp_path / "plan").mkdir()
    write_plan(tmp_path / "plan", plan)
    again = read_plan(tmp_path / "plan")
    assert (again.after, again.layers_kept, again.cost_after) == (
        plan.after,
        plan.layers_kept,
        plan.cost_after,
    )
    assert all(torch.equal(again.keep[axis], plan.keep[axis]) for axis in plan.keep)
    model = load_model(folder)
    Pruning(tmp_path / "plan")(model)
    with pytest.raises(ValueError, match="the plan was made for sizes"):
        Pruning(plan)(model)
    with pytest.raises(ValueError, match="holds no Hugging Face model"):
        Pruning(plan)(torch.nn.Linear(2, 2))


def test_what_a_transform_pruned_is_saved_as_what_it_is(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    checkpoint, plan = plan_for(folder)
    expected = streamed(checkpoint, plan, tmp_path / "pruned")
    model = MinitronModel.from_hf(str(folder)).eval()
    Pruning(plan)(model)
    (tmp_path / "hf").mkdir()
    model.save_hf(tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "hf"), expected)
    restored = MinitronModel.restore_from(
        str(nemo_archive(model, tmp_path / "m.nemo")), map_location="cpu"
    ).eval()
    assert torch.equal(restored.model(torch.arange(20)[None]).logits, expected)
