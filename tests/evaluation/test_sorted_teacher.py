"""A candidate as views of a sorted teacher computes what the pruned checkpoint does."""

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.evaluation.held_out_loss import held_out_loss
from nemo_minitron.evaluation.sorted_teacher import SortedTeacher
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.proof import TOGETHER, halved
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.select import score_shape, select_units
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.scoring.importance import random_scores
from tests.support.models import INSTALLED, make_model

FAMILIES = (  # dense, tied constants, fused projections, mixtures, hybrids
    "llama", "gemma2", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_next", "falcon_h1",
)  # fmt: skip


def sorted_teacher(folder, seed=0):
    checkpoint = open_checkpoint(folder)
    sizes = checkpoint.architecture.sizes
    axes = checkpoint.architecture.prunable
    scores = {
        axis: random_scores(score_shape(checkpoint.family, sizes, axis), seed + number)
        for number, axis in enumerate(axes)
    }
    return checkpoint, scores, SortedTeacher(checkpoint, scores, torch.float32)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in INSTALLED])
def test_the_loss_of_a_candidate_is_that_of_the_pruned_checkpoint(name, tmp_path):
    family = families()[name]
    for number, changes in enumerate(family.proofs[:2]):
        source = tiny_model(family, changes, tmp_path / f"source{number}")
        checkpoint, scores, teacher = sorted_teacher(source)
        family, sizes, axes = (
            checkpoint.family,
            checkpoint.architecture.sizes,
            checkpoint.architecture.prunable,
        )
        targets = halved(family, sizes, TOGETHER, axes)
        layers = list(range(sizes["layers"]))
        layers = layers[1::2] if targets["layers"] < len(layers) else layers
        widths = {axis: size for axis, size in targets.items() if axis != "layers"}
        keep = select_units(family, scores, sizes, widths)
        target = tmp_path / f"pruned{number}"
        target.mkdir()
        write_pruned(
            checkpoint, [(target, Cut(checkpoint.architecture, keep, tuple(layers)))], 10**9
        )
        asked = {
            axis: widths[axis] for axis in axes if axis in widths and not family.axes[axis].follows
        }
        samples_NS = torch.randint(2, 90, (3, 17), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = held_out_loss(load_model(target, torch.float32), family, samples_NS, 2)
            found = held_out_loss(teacher.candidate(asked, layers), family, samples_NS, 2)
            whole = held_out_loss(load_model(source, torch.float32), family, samples_NS, 2)
            again = held_out_loss(
                teacher.candidate({}, range(sizes["layers"])), family, samples_NS, 2
            )
        assert found == pytest.approx(expected, rel=1e-5)
        assert again == pytest.approx(whole, rel=1e-5)
        assert abs(expected - whole) > 1e-3


def test_a_candidate_sends_a_token_to_as_many_experts_as_its_plan_says(tmp_path):
    source = make_model(tmp_path / "model", "mixtral")
    checkpoint, _, teacher = sorted_teacher(source)
    layers = range(checkpoint.architecture.sizes["layers"])
    cut = Cut(checkpoint.architecture, {}, tuple(layers), 1)
    (tmp_path / "pruned").mkdir()
    write_pruned(checkpoint, [(tmp_path / "pruned", cut)], 10**9)
    tokens_BS = torch.arange(2, 26)[None]
    with torch.inference_mode():
        expected = load_model(tmp_path / "pruned", torch.float32)(tokens_BS).logits
        found = teacher.candidate({"experts_per_token": 1}, layers)(tokens_BS).logits
        whole = teacher.candidate({}, layers)(tokens_BS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_a_candidate_is_made_of_views_and_no_two_know_of_each_other(tmp_path):
    source = make_model(tmp_path / "model", "llama")
    checkpoint, _, teacher = sorted_teacher(source)
    held = {
        name: tensor.untyped_storage().data_ptr()
        for name, tensor in teacher.model.state_dict().items()
    }
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    small = teacher.candidate({"hidden": 12, "ffn": 20}, [0, 2])
    for name, tensor in small.state_dict().items():
        origin = name.replace("layers.1.", "layers.2.")
        assert tensor.untyped_storage().data_ptr() == held[origin], name
    # query heads that shrink inside their groups do not lie together: these projections alone are copied
    fewer = teacher.candidate({"heads": 3}, [0, 1, 2])
    copied = {
        name.split(".")[-2]
        for name, tensor in fewer.state_dict().items()
        if tensor.untyped_storage().data_ptr() != held[name]
    }
    assert copied == {"q_proj", "o_proj"}
    assert {n: tuple(t.shape) for n, t in small.state_dict().items()} != {}
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items()
    )
    with pytest.raises(ValueError, match=r"candidate\.hidden: expected 1 to 24"):
        teacher.candidate({"hidden": 25}, [0])
    assert checkpoint.architecture.sizes["hidden"] == 24
