"""A table is either proven or refused: every table, under every config it names, on real tiny models."""

import itertools
import json
import math
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
import transformers

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import Architecture, architecture_of, families, find_row
from nemo_minitron.families.grammar import row_axes
from nemo_minitron.proofs import proof
from nemo_minitron.proofs.page import MARKS, counted, markdown
from nemo_minitron.proofs.proof import (
    PROOFS,
    TOGETHER,
    Finding,
    _groups,
    dead_units,
    described,
    logits_of,
    permutations,
    proof_table,
    prove,
    tabulate,
)
from nemo_minitron.proofs.tiny_models import tiny_config, tiny_model
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.slice import Cut, rescaled
from tests.support.chosen_families import CASES, CHOSEN, ROWS
from tests.support.models import INSTALLED, logits, stream


def test_the_families_that_users_have_are_there():
    asked = {
        "llama", "mistral", "nemotron", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral",
        "qwen2_moe", "qwen3_moe", "granite", "olmo2", "smollm3", "stablelm", "starcoder2", "gpt_oss",
        "nemotron_h", "ministral3", "olmo3", "seed_oss", "exaone4", "hunyuan_v1_dense", "arcee", "glm4", "cohere2",
        "apertus", "ernie4_5", "olmoe", "glm4_moe", "minimax_m2", "llama4_text", "granitemoehybrid", "deepseek_v3",
        "lfm2", "falcon_h1", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
    }  # fmt: skip
    assert asked <= set(families())


@pytest.fixture
def found(once):
    """What the proofs of a family under a configuration find; all test processes share it."""

    def find(name, i):
        def work(folder):
            findings = prove(families()[name], families()[name].proofs[i])
            (folder / "found.json").write_text(json.dumps([astuple(each) for each in findings]))

        text = (once(f"proof-{name}-{i}", work) / "found.json").read_text()
        return [Finding(*each) for each in json.loads(text)]

    return find


@pytest.mark.parametrize(("name", "i"), CASES)
def test_every_proof_of_every_family_holds(found, name, i):
    findings = found(name, i)
    assert not [finding for finding in findings if not finding.holds]
    assert {finding.proof for finding in findings} == set(PROOFS)
    proven = {finding.axis for finding in findings if finding.proof == "strict load"}
    assert {*families()[name].prunable} & {"hidden", "heads", "kv_heads", "layers"} <= proven
    assert TOGETHER in proven


def test_the_table_in_the_docs_is_what_was_found_here(found):
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    if f"with transformers {transformers.__version__}." not in page:
        pytest.skip("the table was made with another transformers")
    head = markdown([]).rsplit("\n", 1)[0]
    table = page[page.index(head) : page.index(MARKS[1])].splitlines()[len(head.splitlines()) :]
    shown = [tuple(line.strip("| ").split(" | ")) for line in table]
    assert list(dict.fromkeys(row[0] for row in shown)) == list(families()), "run make docs"
    for name in CHOSEN:
        family = families()[name]
        findings = [each for i in range(len(family.proofs)) for each in found(name, i)]
        rows = [row for row in shown if row[0] == name]
        assert rows == tabulate(name, family, findings), "run make docs"


def test_families_and_published_configs_are_counted_in_the_docs():
    root = Path(__file__).parents[2]
    for page in (root / "README.md", root / "docs" / "families.md"):
        assert counted(root) in page.read_text(encoding="utf-8"), "run make docs"


@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_every_prunable_axis_is_proven_under_some_config(tmp_path, name):
    family = families()[name]
    seen = set()
    for i, changes in enumerate(family.proofs):
        seen |= set(
            open_checkpoint(tiny_model(family, changes, tmp_path / f"{i}")).architecture.present
        )
    assert set(family.prunable) <= seen


def wrong_rows(row, family):
    """The row with one axis forgotten, for each that can be pruned, and with the factors of a product swapped.

    ``still`` is an axis of the right size that nothing moves.
    """
    for i, dim in enumerate(row.dims):
        for j, product in enumerate(dim):
            for k, axis in enumerate(product):
                if axis in family.prunable:
                    changed = (*product[:k], f"still_{axis}", *product[k + 1 :])
                    yield f"{axis} forgotten", replaced(row, i, (*dim[:j], changed, *dim[j + 1 :]))
            if len(product) == 2 and set(product) & set(family.prunable):
                yield "product swapped", replaced(row, i, (*dim[:j], product[::-1], *dim[j + 1 :]))


def replaced(row, position, dim):
    return replace(row, dims=(*row.dims[:position], dim, *row.dims[position + 1 :]))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_proof_bites_on_every_axis_of_a_row(tmp_path, name):
    """Every axis that a row names is needed: without it, the permuted model computes something else."""
    family = families()[name]
    still = {
        f"still_{axis}": replace(
            family.axes[axis], name=f"still_{axis}", fixed=True, index=None, within=None
        )
        for axis in family.prunable
    }
    left = set(ROWS[name])
    for i, changes in enumerate(family.proofs):
        checkpoint = open_checkpoint(tiny_model(family, changes, tmp_path / f"{i}"))
        axes = [
            a for a in family.prunable if a in checkpoint.architecture.present and a != "layers"
        ]
        table = checkpoint.family
        here = [
            r for r in table.rows if (r.pattern, r.dims) in left and checkpoint.architecture.has(r)
        ]
        before = logits_of(checkpoint.folder) if here else None
        left -= {(row.pattern, row.dims) for row in here}
        for row in here:
            for mistake, wrong in wrong_rows(row, family):
                rows = tuple(wrong if r is row else r for r in table.rows)
                bad = described(
                    checkpoint, replace(table, rows=rows, axes={**family.axes, **still})
                )
                try:
                    moved = permutations(bad, axes, tmp_path, alone=False, before=before)
                    found = [finding.holds for finding in moved]
                except ValueError as error:  # so wrong that the cut itself says no
                    assert "nothing in the name or in dimension 0" in str(error)
                    found = [False]
                assert found == [False], (row.pattern, mistake)
    assert not left


def test_a_wrong_table_fails_its_proof_by_name():
    family = families()["llama"]
    rows = tuple(
        replace(row, dims=((("still",),), *row.dims[1:]))
        if row.pattern.endswith("down_proj.weight")
        else row
        for row in family.rows
    )
    still = replace(
        family.axes["hidden"], name="still", config=("still",), fallback="hidden_size", fixed=True
    )
    wrong = replace(
        family, rows=rows, axes={**family.axes, "still": still}, proofs=({"still": 32},)
    )
    columns, table, failed = proof_table({"llama": wrong})
    cells = {row[1]: dict(zip(columns[2:], row[2:], strict=True)) for row in table}
    assert failed >= 2
    assert cells["hidden"]["permutation"] == "FAILS"
    assert cells["ffn"]["permutation"] == "yes"


def test_where_a_group_of_dead_units_fails_the_axis_is_named(tmp_path):
    """Of a row that forgets an axis units stay behind that were to go; of the others all is well."""
    checkpoint = open_checkpoint(tiny_model(families()["llama"], {}, tmp_path / "m"))
    table, axes = checkpoint.family, ("ffn", "heads", "kv_heads", "layers")
    still = replace(table.axes["ffn"], name="still", fixed=True, index=None)
    rows = [
        replaced(row, 1, (("still",),)) if "down_proj.weight" in row.pattern else row
        for row in table.rows
    ]
    wrong = replace(table, rows=tuple(rows), axes={**table.axes, "still": still})
    for family, failing in ((table, set()), (wrong, {"ffn"})):
        found = list(dead_units(described(checkpoint, family), axes, tmp_path))
        assert [finding.axis for finding in found] == list(axes)
        assert {finding.axis for finding in found if not finding.holds} == failing


def test_dead_units_that_fail_only_together_fail(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_model(families()["llama"], {}, tmp_path / "m"))
    monkeypatch.setattr(proof, "_outlived", lambda _, axes, work: len(axes) == 1)
    found = list(dead_units(checkpoint, ("ffn", "heads", "layers"), tmp_path))
    assert [f.axis for f in found if not f.holds] == [TOGETHER]


@pytest.mark.parametrize("count", range(1, 17))
def test_of_any_two_axes_one_is_moved_without_the_other(count):
    axes = [f"axis {number}" for number in range(count)]
    groups = _groups(axes)
    assert len(groups) == math.ceil(math.log2(count + 1)) and set().union(*groups) == set(axes)
    for one, other in itertools.combinations(axes, 2):
        assert any((one in group) != (other in group) for group in groups)


@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_size_counts_every_parameter_before_anything_is_cut(tmp_path, name):
    for i, changes in enumerate(families()[name].proofs):
        checkpoint = open_checkpoint(tiny_model(families()[name], changes, tmp_path / f"{i}"))
        counted = sum(torch.Size(entry.shape).numel() for entry in checkpoint.entries.values())
        assert model_size(checkpoint.architecture).parameters == counted


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_the_embedding_scale_is_folded(tmp_path, name, tied):
    """Gemma multiplies embeddings by sqrt(hidden_size); a cut must not change how they weigh.

    Half of the channels are dead. What their removal does to the norms is taken back by hand (the mean square
    over half as many channels is twice as large), so that nothing but the embeddings' scale is left to differ.
    """
    from safetensors.torch import load_file, save_file

    family = families()[name]
    source = tiny_model(
        family, {"tie_word_embeddings": tied, "rms_norm_eps": 0.0}, tmp_path / "source"
    )
    file = "model.safetensors"
    tensors = load_file(source / file)
    alive = torch.arange(0, 32, 2)
    for tensor_name, tensor in tensors.items():
        if (
            "_norm" not in tensor_name.replace("layernorm", "_norm")
            and "model.norm" not in tensor_name
        ):
            row = next(row for row in family.rows if row.regex.fullmatch(tensor_name))
            for position, dim in enumerate(row.dims):
                if dim == (("hidden",),):
                    tensor.index_fill_(position, torch.arange(1, 32, 2), 0)
    save_file(tensors, source / file, {"format": "pt"})
    target = stream(source, tmp_path / "cut", {"hidden": alive})
    cut = load_file(target / file)
    for tensor_name, tensor in cut.items():
        if tensor.shape == (16,) and "norm" in tensor_name:
            tensor.copy_((1 + tensor) * 2**0.5 - 1)
    save_file(cut, target / file, {"format": "pt"})
    before, after = logits(source), logits(target)
    assert torch.allclose(before, after, atol=2e-5 * before.abs().max())


def test_a_fold_is_exact_in_float32_and_leaves_other_tensors_alone(tmp_path):
    family = families()["gemma"]
    checkpoint = open_checkpoint(tiny_model(family, {}, tmp_path / "m"))
    from nemo_minitron.pruning.slice import pieces

    cut = Cut(checkpoint.architecture, {"hidden": torch.arange(8)}, (0, 1, 2, 3))
    scaled = {p.source: p for p in pieces(cut, list(checkpoint.entries)) if p.scale != 1}
    assert {name: (round(p.scale, 6), p.offset) for name, p in scaled.items()} == {
        "model.embed_tokens.weight": (2.0, 0.0),
        "model.norm.weight": (0.5, 1.0),
    }
    x = torch.tensor([0.5, -0.25])
    assert rescaled(x, scaled["model.norm.weight"]).tolist() == [-0.25, -0.625]


@pytest.mark.parametrize(
    ("name", "changes", "layers", "expected"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}, (1, 2), {"mlp_only_layers": [0], "decoder_sparse_step": 1}),
        ("qwen2_moe", {"decoder_sparse_step": 2}, (0, 1, 3), {"mlp_only_layers": [0], "decoder_sparse_step": 1}),
        ("gemma3_text", {"sliding_window_pattern": 2}, (1, 2), {"layer_types": ["full_attention", "sliding_attention"]}),
        ("smollm3", {"no_rope_layer_interval": 2}, (1, 2), {"no_rope_layers": [0, 1]}),
        ("nemotron_h", {"hybrid_override_pattern": "M*-E"}, (1, 3), {"hybrid_override_pattern": "*E"}),
        ("nemotron_h", {"layers_block_type": ["mamba", "attention"], "num_hidden_layers": 2}, (1,), {"layers_block_type": ["attention"]}),
        ("gpt_oss", {}, (1, 3), {"layer_types": ["full_attention", "full_attention"]}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, (1, 3), {"layer_types": ["full_attention", "sliding_attention"]}),
        ("llama", {}, (1, 3), {}),
    ],
)  # fmt: skip
def test_what_a_config_says_per_layer_goes_with_the_layers(name, changes, layers, expected):
    from nemo_minitron.pruning.slice import cut_config

    family = families()[name]
    config = tiny_config(family, changes)
    written = cut_config(Cut(Architecture(family, config), {}, layers))
    assert {key: written[key] for key in expected} == expected
    assert written["num_hidden_layers"] == len(layers)
    assert Architecture(family, written).sizes["layers"] == len(layers)
    assert set(written) - set(config) <= {*expected, *family.axes["layers"].lists, *family.axes["layers"].indices, *family.axes["layers"].after, "head_dim"}  # fmt: skip


def test_no_two_rows_of_a_table_name_the_same_tensor():
    for family in families().values():
        for left, right in itertools.combinations(family.rows, 2):
            assert left.pattern == right.pattern or not left.regex.fullmatch(
                right.pattern.replace("{layer}", "0").replace("{expert}", "0")
            )
        assert row_axes(family.rows[0].dims)


@pytest.mark.parametrize("number", range(3))
def test_of_rows_with_one_pattern_each_is_that_of_its_own_layers(number):
    """Gemma 4's heads are longer in some layers, its MLP is wider in others."""
    family = families()["gemma4_text"]
    model = architecture_of(tiny_config(family, family.proofs[number]))
    for name, row, _ in model.tensors():
        assert [other for other in model.family.rows if other.regex.fullmatch(name)] == [row]
        assert find_row(model.family, name)[0] is row
    shapes = {name: shape for name, _, shape in model.tensors()}
    last, first = "model.layers.3.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert (shapes[first], shapes[last]) == ((8 * 4, 32), (8 * 8, 32))
    assert find_row(model.family, "model.layers.9.self_attn.q_proj.weight") is None
