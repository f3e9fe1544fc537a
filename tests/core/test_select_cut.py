import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.artifacts.checkpoint import open_checkpoint
from nemo_minitron.core.cut import Cut, cut_config, cut_names, cut_tensor, dim_index
from nemo_minitron.core.select import kept_layers, scattered, select_units, top, top_within
from nemo_minitron.families import axis_sizes, families, parse_row
from nemo_minitron.families.family import TensorRow
from nemo_minitron.stages.prune import write_pruned
from tests.conftest import logits, make_model


def test_the_best_stay_in_their_original_order_and_ties_go_to_the_lower_index():
    assert top(torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0]), 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="NaN"):
        top(torch.tensor([1.0, float("nan")]), 1)


@given(
    groups=st.integers(1, 4), size=st.integers(1, 5), kept_groups=st.integers(1, 4), per_group=st.integers(1,
    5), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_kept_group_keeps_the_same_number_of_its_best(groups, size, kept_groups, per_group, seed):
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
    sizes = {"hidden": 8, "ffn": 4, "heads": 6, "kv_heads": 3, "head_dim": 2, "vocab": 9, "layers": 1}
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


def test_indices_of_products_and_concatenations():
    (dim,) = parse_row("(heads head_dim | kv head_dim)")
    index = dim_index(dim, {"heads": 3, "kv": 2, "head_dim": 2}, {"heads": torch.tensor([0, 2])})
    assert index.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert dim_index(dim, {"heads": 3, "kv": 2, "head_dim": 2}, {"ffn": torch.tensor([0])}) is None


def test_a_tensor_of_another_shape_than_its_row_is_refused():
    import re

    row = TensorRow("w", parse_row("ffn hidden"), None, re.compile("w"))
    with pytest.raises(ValueError, match=r"w: expected shape \[3, 4\], found \[4, 3\]"):
        cut_tensor(torch.zeros(4, 3), row, {"ffn": 3, "hidden": 4}, {})


def kill_units(folder, layer, neurons, heads):
    """Makes neurons and heads of a saved model exactly dead: their output weights are zero."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    block = model.model.layers[layer]
    width = model.config.head_dim
    with torch.no_grad():
        block.mlp.down_proj.weight[:, neurons] = 0
        for head in heads:
            block.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", sorted(families()))
def test_removing_dead_neurons_heads_and_identity_layers_changes_nothing(tmp_path, name):
    folder = make_model(tmp_path / "source", name, num_attention_heads=6, num_key_value_heads=3)
    neurons, heads = [1, 7, 8, 30], [0, 3, 4]
    for layer in range(3):
        kill_units(folder, layer, neurons, heads)
    kill_units(folder, 1, list(range(40)), list(range(6)))  # layer 1 adds nothing to the residual stream
    checkpoint = open_checkpoint(folder)
    keep = {
        "ffn": torch.tensor([[i for i in range(40) if i not in neurons]] * 3),
        "heads": torch.tensor([[i for i in range(6) if i not in heads]] * 3),
    }
    # heads 1, 2, 5 lie in groups 0, 1, 2: one left in each
    target = tmp_path / "pruned"
    target.mkdir()
    write_pruned(checkpoint, Cut(checkpoint.family, checkpoint.config, keep, (0, 2)), target, 10**9)
    before, after = logits(folder), logits(target)
    assert torch.allclose(before, after, atol=1e-5 * before.abs().max())


@settings(max_examples=12, deadline=None)
@given(
    kv=st.integers(1, 3), ratio=st.integers(1, 3), width=st.sampled_from([2, 6, 10]), ffn=st.integers(3, 17),
    layers=st.integers(1, 4), tied=st.booleans(), data=st.data(),
)  # fmt: skip
def test_any_cut_of_any_shape_loads_strictly_and_generates(
    tmp_path_factory, kv, ratio, width, ffn, layers, tied, data
):
    import transformers

    folder = tmp_path_factory.mktemp("any")
    source = make_model(
        folder / "source", "nemotron", num_key_value_heads=kv, num_attention_heads=kv * ratio, head_dim=width,
        intermediate_size=ffn, num_hidden_layers=layers, tie_word_embeddings=tied,
    )  # fmt: skip
    checkpoint = open_checkpoint(source)
    sizes = axis_sizes(checkpoint.family, checkpoint.config)
    new_kv = data.draw(st.integers(1, kv))
    targets = {
        **sizes,
        "hidden": data.draw(st.integers(1, 24)),
        "ffn": data.draw(st.integers(1, ffn)),
        "kv_heads": new_kv,
        "heads": new_kv * data.draw(st.integers(1, ratio)),
    }
    scores = {
        "hidden": torch.rand(24),
        "ffn": torch.rand(layers, ffn),
        "heads": torch.rand(layers, kv * ratio),
    }
    keep = select_units(checkpoint.family, scores, sizes, targets)
    kept = tuple(kept_layers(layers, list(range(data.draw(st.integers(0, layers - 1))))))
    target = folder / "pruned"
    target.mkdir()
    write_pruned(checkpoint, Cut(checkpoint.family, checkpoint.config, keep, kept), target, 4000)
    assert torch.isfinite(logits(target)).all()
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    out = model.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 6)
    for key, value in (
        ("hidden_size", targets["hidden"]),
        ("head_dim", width),
        ("num_hidden_layers", len(kept)),
    ):
        assert getattr(model.config, key) == value


def test_layers_are_renumbered_and_their_lists_cut():
    from dataclasses import replace

    family = families()["llama"]
    axis = replace(family.axes["layers"], lists=("layer_types",))
    family = replace(family, axes={**family.axes, "layers": axis})
    config = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 3,
        "num_attention_heads": 2, "vocab_size": 5, "layer_types": ["a", "b", "c"],
    }  # fmt: skip
    cut = Cut(family, config, {}, (0, 2))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    assert [(new, old) for new, old, _, _ in cut_names(cut, names)] == [
        (names[0], names[0]),
        (names[1], names[2]),
    ]
    written = cut_config(cut)
    assert (written["layer_types"], written["num_hidden_layers"], written["head_dim"]) == (["a", "c"], 2, 4)
    with pytest.raises(ValueError, match="layer_types should list 3 layers"):
        cut_config(Cut(family, {**config, "layer_types": ["a"]}, {}, (0,)))
