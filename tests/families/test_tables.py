"""A table is proven by permuting every axis through it: a correct table leaves the logits as they were."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from nemo_minitron.artifacts.checkpoint import open_checkpoint
from nemo_minitron.core.cut import Cut
from nemo_minitron.core.size import model_size
from nemo_minitron.families import axis_sizes, families, find_row, load_family, parse_row
from nemo_minitron.families.family import TABLES, expand
from nemo_minitron.stages.prune import write_pruned
from tests.conftest import logits, make_model

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "multi_head": {"num_key_value_heads": 6},
}
CASES = list(itertools.product(sorted(families()), VARIANTS))


def permutation(family, config, axes, seed=1):
    """Kept units that keep all of them, in another order.

    Heads move inside their group, groups move whole.
    """
    sizes = axis_sizes(family, config)
    generator = torch.Generator().manual_seed(seed)
    layers, groups = sizes["layers"], sizes["kv_heads"]
    per_group = sizes["heads"] // groups
    keep = {}
    if "hidden" in axes:
        keep["hidden"] = torch.randperm(sizes["hidden"], generator=generator)
    if "ffn" in axes:
        keep["ffn"] = torch.stack([torch.randperm(sizes["ffn"], generator=generator) for _ in range(layers)])
    if "kv_heads" in axes or "heads" in axes:
        order, heads = [], []
        for _ in range(layers):
            still = torch.arange(groups)
            group = torch.randperm(groups, generator=generator) if "kv_heads" in axes else still
            inside = [
                torch.randperm(per_group, generator=generator) if "heads" in axes else torch.arange(per_group)
                for _ in range(groups)
            ]
            order.append(group)
            heads.append(torch.cat([g * per_group + inside[int(g)] for g in group]))
        keep["heads"] = torch.stack(heads)
        if "kv_heads" in axes:
            keep["kv_heads"] = torch.stack(order)
    return keep


def permuted(source: Path, target: Path, axes, family=None) -> Path:
    checkpoint = open_checkpoint(source)
    if family is not None:
        checkpoint = replace(checkpoint, family=family)
    keep = permutation(checkpoint.family, checkpoint.config, axes)
    target.mkdir()
    cut = Cut(
        checkpoint.family, checkpoint.config, keep, tuple(range(checkpoint.config["num_hidden_layers"]))
    )
    write_pruned(checkpoint, cut, target, 10**9)
    return target


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_permuting_every_axis_leaves_the_logits(tmp_path, name, variant):
    source = make_model(tmp_path / "source", name, **VARIANTS[variant])
    before = logits(source)
    for axes in (["hidden"], ["ffn"], ["heads"], ["kv_heads"], ["hidden", "ffn", "heads", "kv_heads"]):
        after = logits(permuted(source, tmp_path / "-".join(axes), axes))
        assert torch.allclose(before, after, atol=1e-5 * before.abs().max()), axes


# every size that could be confused is equal here, so that only the permutation can tell
ALIKE = {
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 4,
}
WRONG = {
    "transposed": ("mlp.down_proj.weight", "ffn hidden"),
    "norm of another axis": ("post_attention_layernorm.weight", "ffn"),
    "final norm forgotten": ("model.norm.weight", "still"),
    "head order swapped": ("self_attn.v_proj.weight", "(head_dim kv_heads) hidden"),
    "output heads forgotten": ("self_attn.o_proj.weight", "hidden still"),
    "embedding forgotten": ("embed_tokens.weight", "vocab still"),
    "mlp neurons forgotten": ("mlp.up_proj.weight", "still hidden"),
}


@pytest.mark.parametrize("name", sorted(families()))
@pytest.mark.parametrize("mistake", WRONG)
def test_the_permutation_test_bites(tmp_path, name, mistake):
    source = make_model(tmp_path / "source", name, **ALIKE)
    before = logits(source)
    ending, text = WRONG[mistake]
    family = families()[name]
    # an axis of the right size that nothing permutes stands for 'this row forgot the axis'
    still = replace(family.axes["hidden"], name="still", fixed=True)
    rows = tuple(
        replace(row, dims=parse_row(text)) if row.pattern.endswith(ending) else row for row in family.rows
    )
    assert rows != family.rows
    wrong = replace(family, rows=rows, axes={**family.axes, "still": still})
    after = logits(permuted(source, tmp_path / "wrong", ["hidden", "ffn", "heads", "kv_heads"], wrong))
    assert (before - after).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_size_counts_every_parameter(tmp_path, name, variant):
    source = make_model(tmp_path / "source", name, **VARIANTS[variant])
    checkpoint = open_checkpoint(source)
    counted = sum(torch.Size(entry.shape).numel() for entry in checkpoint.entries.values())
    assert model_size(checkpoint.family, checkpoint.config).parameters == counted


@pytest.mark.parametrize("name", sorted(families()))
def test_taps_and_modules_exist_in_the_installed_transformers(tmp_path, name):
    import transformers

    family = families()[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "m", name))
    sizes = axis_sizes(family, model.config.to_dict())
    assert set(family.taps) >= {"hidden", "ffn", "heads", "layers"}
    for taps in family.taps.values():
        for tap in taps:
            for path in expand(family, tap.module, sizes):
                model.get_submodule(path)
    for path in family.modules.values():
        model.get_submodule(path)
    assert type(model).__name__ == family.architecture


def edited(tmp_path, change):
    table = yaml.safe_load((TABLES / "llama.yaml").read_text())
    change(table)
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(table))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(colour="red"), "unknown keys .'colour'"),
        (lambda t: t["axes"]["ffn"].update(color="red"), "axis ffn: unknown keys"),
        (lambda t: t["tensors"].update({"x": "hidden width"}), "axes .'width'. are not declared"),
        (lambda t: t["tensors"].update({"x?": "hidden"}), "needs an entry under 'when'"),
        (lambda t: t["when"].update({"y": "tied"}), "rows that do not exist"),
        (lambda t: t["tensors"].update({"x.{expert}": "hidden"}), "belong to no axis"),
        (lambda t: t["taps"].update(ffn=["side of x"]), "expected 'input of MODULE'"),
        (lambda t: t.update(constraints=["width > 1"]), "not declared"),
    ],
)
def test_a_table_with_a_mistake_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_family(edited(tmp_path, change))


def test_every_tensor_name_matches_one_row():
    for family in families().values():
        names = [name for row in family.rows for name in expand(family, row.pattern, {"layers": 2})]
        assert len(set(names)) == len(names)
        for name in names:
            assert sum(row.regex.fullmatch(name) is not None for row in family.rows) == 1
        assert find_row(family, "model.layers.0.surprise.weight") is None
