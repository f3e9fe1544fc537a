"""Rows of multi-token prediction layers: proven by transformers' own module, and red where one is wrong."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint, read_entry
from nemo_minitron.families import families, layers_behind, prediction_layers
from nemo_minitron.families.grammar import parse_row
from nemo_minitron.proofs.prediction_proof import (
    drafted,
    reordered,
    runs_predictions,
    with_predictions,
)
from nemo_minitron.proofs.proof import PREDICTIONS, described, equal, predictions
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.slice_predictions import CutPredictions
from nemo_minitron.scoring.magnitude import magnitudes

pytestmark = pytest.mark.skipif(not runs_predictions(), reason="this transformers runs none")
PROVEN = [name for name, family in families().items() if family.mtp_block]


def test_families_whose_prediction_layers_are_described():
    assert PROVEN == ["deepseek_v3", "glm4_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"]


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    """Tiny models with prediction layers, and what these draft."""
    made = {}

    def find(name):
        if name not in made:
            work = tmp_path_factory.mktemp(name)
            tiny_model(families()[name], families()[name].proofs[0], work / "plain")
            folder = with_predictions(work / "plain", work / "behind")
            made[name] = open_checkpoint(folder), drafted(folder)
        return made[name]

    return find


@pytest.mark.parametrize("name", PROVEN)
def test_what_they_draft_stays_when_all_units_move(behind, tmp_path, name):
    checkpoint, before = behind(name)
    assert equal(before, drafted(reordered(checkpoint, tmp_path / "moved")))


@pytest.mark.parametrize(
    ("name", "row", "wrong"),
    [
        ("glm4_moe", "model.layers.{layer}.eh_proj.weight", "hidden (hidden | still)"),
        ("glm4_moe", "model.layers.{layer}.eh_proj.weight", "hidden (still | hidden)"),
        ("glm4_moe", "model.layers.{layer}.eh_proj.weight", "still (hidden | hidden)"),
        ("glm4_moe", "model.layers.{layer}.enorm.weight", "still"),
        ("glm4_moe", "model.layers.{layer}.hnorm.weight", "still"),
        ("glm4_moe", "model.layers.{layer}.shared_head.norm.weight", "still"),
        ("qwen3_next", "mtp.fc.weight", "hidden (hidden 2)"),
        ("qwen3_next", "mtp.pre_fc_norm_embedding.weight", "still"),
        ("qwen3_next", "mtp.pre_fc_norm_hidden.weight", "still"),
        ("qwen3_next", "mtp.norm.weight", "still"),
    ],
)
def test_a_wrong_row_is_found(behind, tmp_path, name, row, wrong):
    checkpoint, before = behind(name)
    family = checkpoint.family
    rows = tuple(
        replace(each, dims=parse_row(wrong)) if each.pattern == row else each
        for each in family.mtp_rows
    )
    assert rows != family.mtp_rows
    still = replace(family.axes["hidden"], name="still", fixed=True)
    bad = described(
        checkpoint, replace(family, mtp_rows=rows, axes={**family.axes, "still": still})
    )
    assert not equal(before, drafted(reordered(bad, tmp_path / "moved")))


def test_a_layer_of_another_kind_is_found(behind, tmp_path):
    """A prediction layer of GLM-4.5 has experts, whatever the first layers of the model have."""
    checkpoint, _ = behind("glm4_moe")
    bad = described(checkpoint, replace(checkpoint.family, mtp_like={"first_k_dense_replace": 2}))
    found = list(predictions(bad, tmp_path))
    assert {(each.axis, each.holds) for each in found} == {(PREDICTIONS, False)}
    assert "is in no row" in found[0].note


def test_numbers_on_disk_and_alone(behind):
    checkpoint, _ = behind("glm4_moe")
    layers = layers_behind(checkpoint.architecture, 2)
    name = "model.layers.5.mlp.experts.3.up_proj.weight"
    assert layers.inner_name(name, 4) == "model.layers.1.mlp.experts.3.up_proj.weight"
    assert layers.stored_name(layers.inner_name(name, 4), 3) == name.replace("layers.5", "layers.4")
    own = layers_behind(behind("qwen3_next")[0].architecture, 1)
    assert own.inner_name("mtp.fc.weight", 4) == "mtp.fc.weight"
    assert own.stored_name("mtp.layers.0.mlp.gate.weight", 4) == "mtp.layers.0.mlp.gate.weight"
    assert own.architecture.sizes["layers"] == 1


def test_their_embedding_and_head_go_with_the_vocabulary(behind):
    checkpoint, _ = behind("deepseek_v3")
    kept_V = torch.arange(0, 96, 2)
    cut = Cut(checkpoint.architecture, {"vocab": kept_V}, (0, 1, 2, 3))
    found, stored = CutPredictions(checkpoint, cut, magnitudes), checkpoint.predictions
    for name in ("model.layers.4.shared_head.head.weight", "model.layers.4.embed_tokens.weight"):
        whole = read_entry(checkpoint.folder, stored[name], name)
        assert torch.equal(found.read(name), whole[kept_V])
    name = "model.layers.4.eh_proj.weight"
    assert torch.equal(found.read(name), read_entry(checkpoint.folder, stored[name], name))


def test_checkpoints_may_leave_out_what_repeats_the_models_own(behind):
    checkpoint, _ = behind("deepseek_v3")
    names = list(checkpoint.predictions)
    few = [name for name in names if not name.endswith(("head.head.weight", "tokens.weight"))]
    assert len(few) == len(names) - 2
    assert prediction_layers(checkpoint.architecture, few) is not None
    with pytest.raises(ValueError, match=r"model\.layers\.4\.enorm\.weight is missing"):
        prediction_layers(checkpoint.architecture, [n for n in few if "enorm" not in n])
