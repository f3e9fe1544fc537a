import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import (
    Architecture,
    TensorRow,
    check_sizes,
    families,
    parse_row,
)
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.proof import generates
from nemo_minitron.proofs.tiny_models import tiny_config, tiny_model
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.positions import dim_index
from nemo_minitron.pruning.select import (
    complete_targets,
    contiguous,
    kept_layers,
    least,
    scattered,
    score_shape,
    select_units,
    top,
    top_within,
)
from nemo_minitron.pruning.slice import Cut, Piece, cut_config, cut_tensor, pieces
from nemo_minitron.scoring.importance import random_scores
from tests.support.fuzzing import examples
from tests.support.models import logits, stream


def test_the_best_stay_in_their_original_order_and_ties_go_to_the_lower_index():
    assert top(torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0]), 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="NaN"):
        top(torch.tensor([1.0, float("nan")]), 1)


@given(
    groups=st.integers(1, 4), size=st.integers(1, 5), kept_groups=st.integers(1, 4), per_group=st.integers(1,
    5), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_kept_group_keeps_the_same_number_of_its_best(
    groups, size, kept_groups, per_group, seed
):
    kept_groups, per_group = min(groups, kept_groups), min(size, per_group)
    scores = torch.rand(2, groups * size, generator=torch.Generator().manual_seed(seed))
    chosen_groups = top(torch.rand(2, groups), kept_groups)
    chosen = top_within(scores, chosen_groups, groups, per_group)
    assert chosen.shape == (2, kept_groups * per_group)
    for layer in range(2):
        for i, group in enumerate(chosen_groups[layer].tolist()):
            inside = chosen[layer, i * per_group : (i + 1) * per_group]
            assert inside.tolist() == sorted(inside.tolist())
            own = scores[layer, group * size : (group + 1) * size]
            expected = own.topk(per_group).indices + group * size
            assert set(inside.tolist()) == set(expected.tolist())


def test_pruning_groups_takes_their_heads_along():
    family = families()["llama"]
    sizes = {
        "hidden": 8,
        "ffn": 4,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 2,
        "vocab": 9,
        "layers": 1,
    }
    scores = {"heads": torch.tensor([[1.0, 1.0, 9.0, 0.0, 5.0, 4.0]])}
    keep = select_units(family, scores, sizes, {**sizes, "kv_heads": 2, "heads": 4})
    assert keep["kv_heads"].tolist() == [[1, 2]]
    assert keep["heads"].tolist() == [[2, 3, 4, 5]]
    keep = select_units(family, scores, sizes, {**sizes, "heads": 3})
    assert keep["heads"].tolist() == [[0, 2, 4]]
    assert "kv_heads" not in keep


def test_layers():
    assert scattered(torch.tensor([3.0, 0.0, 1.0, 2.0]), 2) == [1, 2]
    assert kept_layers(5, [1, 3]) == [0, 2, 4]
    assert contiguous(torch.tensor([3.0, 1.0, 1.0, 2.0]), 2) == [2, 3]  # of equals the later block


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_layers_whose_importance_is_not_finite_are_refused_unless_they_are_gone(bad):
    scores = torch.tensor([0.2, bad, 0.1, 0.3])
    for choose in (scattered, contiguous):
        with pytest.raises(ValueError, match="NaN or infinity"):
            choose(scores, 2)
    with pytest.raises(ValueError, match="NaN or infinity"):
        least(scores, [0])
    assert least(scores, [1]) == 2 and least(scores, [1, 2]) == 0
    assert scores[1].isfinite().logical_not()  # they stay as they were


def test_indices_of_products_and_concatenations():
    (dim,) = parse_row("(heads head_dim | kv head_dim)")
    index = dim_index(dim, {"heads": 3, "kv": 2, "head_dim": 2}, {"heads": torch.tensor([0, 2])})
    assert index.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert dim_index(dim, {"heads": 3, "kv": 2, "head_dim": 2}, {"ffn": torch.tensor([0])}) is None


def test_a_tensor_of_another_shape_than_its_row_is_refused():
    import re

    row = TensorRow("w", parse_row("ffn hidden"), None, re.compile("w"))
    piece = Piece("w", "w", row, (3, 4), (None, None))
    with pytest.raises(ValueError, match=r"w: expected shape \[3, 4\], found \[4, 3\]"):
        cut_tensor(torch.zeros(4, 3), piece, {"ffn": 3, "hidden": 4})


@settings(max_examples=examples(40), deadline=None)
@given(
    name=st.sampled_from(["llama", "nemotron", "mistral", "qwen3", "phi3", "gemma2", "olmo2", "qwen3_moe", "gpt_oss"]),
    kv=st.integers(1, 3), ratio=st.integers(1, 3), width=st.sampled_from([2, 3, 6, 10]), ffn=st.integers(3, 17),
    layers=st.integers(1, 4), tied=st.booleans(), data=st.data(),
)  # fmt: skip
def test_any_cut_of_any_shape_is_refused_before_or_loads_strictly_and_generates(
    tmp_path_factory, name, kv, ratio, width, ffn, layers, tied, data
):
    family = families()[name]
    folder = tmp_path_factory.mktemp("any")
    sizes = {
        "num_key_value_heads": kv, "num_attention_heads": kv * ratio, "head_dim": width, "intermediate_size": ffn,
        "num_hidden_layers": layers, "tie_word_embeddings": tied, "hidden_size": 8 * kv * ratio,
    }  # fmt: skip
    if "expert_ffn" in family.axes:
        sizes["intermediate_size"] = 8 * ffn
    try:
        source = tiny_model(family, sizes, folder / "source")
        logits(source)
    except (
        ValueError,
        RuntimeError,
    ):  # transformers itself cannot have this source: an odd head_dim
        assert width % 2
        with pytest.raises(ValueError, match="head_dim % 2 == 0"):
            check_sizes(family, Architecture(family, tiny_config(family, sizes)).sizes, "source")
        return
    checkpoint = open_checkpoint(source)
    before = checkpoint.architecture.sizes
    asked = {
        axis: data.draw(st.integers(1, before[axis]), axis)
        for axis in checkpoint.architecture.present
        if axis in family.prunable and axis != "layers" and data.draw(st.booleans(), axis)
    }
    try:
        targets = complete_targets(family, before, asked)
        check_sizes(family, targets, "plan")
    except ValueError as error:
        assert "plan" in str(error)
        return
    scores = {axis: random_scores(score_shape(family, before, axis), 0) for axis in family.prunable}
    keep = select_units(family, scores, before, targets)
    kept = tuple(kept_layers(layers, list(range(data.draw(st.integers(0, layers - 1))))))
    target = stream(source, folder / "pruned", keep, kept)
    assert torch.isfinite(logits(target)).all()
    model = load_model(target, torch.float32)
    assert generates(model, 3)
    assert Architecture(family, model.config.to_dict()).sizes == {**targets, "layers": len(kept)}
    counted = sum(
        torch.Size(entry.shape).numel() for entry in open_checkpoint(target).entries.values()
    )
    assert model_size(Cut(checkpoint.architecture, {}, kept).result.resized({**targets, "layers": len(kept)})).parameters == counted  # fmt: skip


@pytest.mark.parametrize("axis", ["heads", "kv_heads", "ffn"])
def test_targets_that_cannot_be_are_named(axis):
    family = families()["llama"]
    sizes = {
        "hidden": 32,
        "ffn": 40,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 4,
        "vocab": 96,
        "layers": 4,
    }
    assert complete_targets(family, sizes, {"kv_heads": 1})["heads"] == 4
    with pytest.raises(ValueError, match=f"plan.{axis}: expected 1 to {sizes[axis]}"):
        complete_targets(family, sizes, {axis: sizes[axis] + 1})
    with pytest.raises(ValueError, match=r"plan\.heads: expected a multiple of kv_heads = 2"):
        complete_targets(family, sizes, {"heads": 5})
    with pytest.raises(ValueError, match="1 kv_heads can keep at most 4 heads"):
        complete_targets(family, sizes, {"heads": 8, "kv_heads": 1})


def test_layers_are_renumbered_and_their_lists_cut():
    from dataclasses import replace

    family = families()["llama"]
    axis = replace(family.axes["layers"], lists={"layer_types": None})
    family = replace(family, axes={**family.axes, "layers": axis})
    config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 3,
        "num_attention_heads": 2, "vocab_size": 5, "layer_types": ["a", "b", "c"],
    }  # fmt: skip
    cut = Cut(Architecture(family, config), {}, (0, 2))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    found = [(piece.name, piece.source) for piece in pieces(cut, names)]
    assert found == [(names[0], names[0]), (names[1], names[2])]
    written = cut_config(cut)
    assert (written["layer_types"], written["num_hidden_layers"], written["head_dim"]) == (
        ["a", "c"],
        2,
        4,
    )
    with pytest.raises(ValueError, match="layer_types should list 3 layers"):
        cut_config(Cut(Architecture(family, {**config, "layer_types": ["a"]}), {}, (0,)))
