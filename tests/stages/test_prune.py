"""Pruning a model directory by its sizes alone, several plans in one pass, and what is refused before a cut."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nemo_minitron.cli.main import main
from nemo_minitron.families import families
from nemo_minitron.families.table import OWN_TABLES, TABLES
from nemo_minitron.proofs.tiny_models import tiny_model
from tests.support.models import logits, make_model
from tests.support.runs import refused


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_sizes_alone_prune_a_model_directory(capsys, tmp_path, importance):
    source = make_model(tmp_path / "m", "llama")
    workspace = tmp_path / "ws"
    words = [f"workspace={workspace}", f"source.model={source}", f"score.importance={importance}"]
    assert (
        main(
            [
                "prune",
                *words,
                "plan.hidden=12",
                "plan.ffn=20",
                "plan.kv_heads=1",
                "plan.drop_layers=[1]",
            ]
        )
        == 0
    )
    config = json.loads((workspace / "pruned" / "config.json").read_text())
    sizes = [
        config[key]
        for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "num_hidden_layers")
    ]
    assert sizes == [12, 20, 1, 2]
    assert logits(workspace / "pruned").shape == (1, 20, 96)
    capsys.readouterr()
    assert main(["prune", *words, "--json"]) == 0  # nothing asked anew: what is there stays
    assert json.loads(capsys.readouterr().out)["made"] is False
    assert main(["prune", *words, "plan.hidden=18"]) == 0
    assert json.loads((workspace / "pruned" / "config.json").read_text())["hidden_size"] == 18


def test_names_of_code_that_does_not_come_along_stay_behind(tmp_path):
    """As repositories have them that are older than their class in transformers."""
    source = make_model(tmp_path / "m", "phi3")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config"}
    (source / "config.json").write_text(json.dumps(config))
    words = [f"workspace={tmp_path / 'ws'}", f"source.model={source}", "score.importance=magnitude"]
    assert main(["prune", *words, "plan.ffn=20"]) == 0
    pruned = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ws" / "pruned", trust_remote_code=True
    )
    assert type(pruned) is transformers.Phi3ForCausalLM


def test_the_largest_by_magnitude_stay(tmp_path):
    source = make_model(tmp_path / "m", "llama")
    words = [f"workspace={tmp_path / 'ws'}", f"source.model={source}", "score.importance=magnitude"]
    assert main(["prune", *words, "plan.ffn=20"]) == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "ws" / "pruned")
    )
    for layer in range(3):
        parts = [
            before[f"model.layers.{layer}.mlp.{n}_proj.weight"].double()
            for n in ("gate", "up", "down")
        ]
        norms = (
            parts[0].square().sum(1) + parts[1].square().sum(1) + parts[2].square().sum(0)
        ).sqrt()
        best = norms.topk(20).indices.sort().values
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(after[name], before[name][best])


def test_layers_named_by_hand_need_no_scores(tmp_path):
    source = make_model(tmp_path / "m", "llama")
    workspace = tmp_path / "ws"
    assert (
        main(["prune", f"workspace={workspace}", f"source.model={source}", "plan.drop_layers=[0]"])
        == 0
    )
    assert not (workspace / "scores").exists()
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(workspace / "pruned" / "model.safetensors"),
    )
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(after[name.format(0)], before[name.format(1)])


def test_several_plans_are_pruned_in_one_pass(capsys, tmp_path):
    source = make_model(tmp_path / "m", "llama")
    small, large = tmp_path / "small", tmp_path / "large"
    common = [f"source.model={source}", "score.importance=magnitude"]
    for workspace, size in ((small, 12), (large, 18)):
        assert main(["plan", f"workspace={workspace}", *common, f"plan.hidden={size}"]) == 0
    capsys.readouterr()
    words = ["prune", f"workspace={small}", *common, f"prune.also=[{large}]"]
    assert main(words) == 0
    assert "and 1 more of the same pass" in capsys.readouterr().out
    for workspace, size in ((small, 12), (large, 18)):
        assert json.loads((workspace / "pruned" / "config.json").read_text())["hidden_size"] == size
        assert main(["verify", str(workspace)]) == 0
    alone = tmp_path / "alone"
    assert main(["prune", f"workspace={alone}", *common, "plan.hidden=18"]) == 0
    weights = "pruned/model.safetensors"
    assert (alone / weights).read_bytes() == (large / weights).read_bytes()
    other = tmp_path / "other"
    model = make_model(tmp_path / "o", "llama", seed=3)
    assert (
        main(["plan", f"workspace={other}", f"source.model={model}", *common[1:], "plan.hidden=12"])
        == 0
    )
    capsys.readouterr()
    line = refused(capsys, "prune", f"workspace={small}", *common, f"prune.also=[{other}]")
    assert "its source is another model" in line
    assert not (other / "pruned").exists()


@pytest.mark.parametrize(
    ("name", "changes", "targets", "message"),
    [
        ("llama", {}, ["plan.experts=2"], "plan.experts: family 'llama' has no prunable axis of that name"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, ["plan.experts=2"], "this model has no prunable axis of that name"),
        ("qwen3_moe", {}, ["plan.experts=1"], "experts >= experts_per_token"),
        ("qwen3_moe", {}, ["plan.hidden=20"], "hidden % 8 == 0"),
        ("gemma2", {}, ["plan.heads=7"], "plan.heads: expected a multiple of kv_heads = 2"),
        ("gemma2", {}, ["plan.hidden=30"], "gemma2 needs hidden % heads == 0"),
        ("gpt_oss", {}, ["plan.head_dim=2"], "plan.head_dim"),
    ],
)  # fmt: skip
def test_what_would_not_load_is_refused_before_a_byte_is_cut(
    capsys, tmp_path, name, changes, targets, message
):
    source = tiny_model(families()[name], changes, tmp_path / "m")
    words = [
        f"workspace={tmp_path / 'ws'}",
        f"source.model={source}",
        "score.importance=random",
        *targets,
    ]
    assert message in refused(capsys, "prune", *words)
    assert not (tmp_path / "ws" / "pruned").exists()
    assert not (tmp_path / "ws" / "plan").exists()


def test_a_hybrid_keeps_an_attention_layer(capsys, tmp_path):
    pytest.importorskip("transformers.models.nemotron_h")
    source = tiny_model(
        families()["nemotron_h"], {"hybrid_override_pattern": "M*-M"}, tmp_path / "m"
    )
    words = [f"workspace={tmp_path / 'ws'}", f"source.model={source}"]
    assert "heads" in refused(capsys, "prune", *words, "plan.drop_layers=[1]")
    assert main(["prune", *words, "plan.drop_layers=[0,2]"]) == 0
    first, second = json.loads((tmp_path / "ws" / "pruned" / "config.json").read_text())[
        "layers_block_type"
    ]
    assert first in ("attention", "full_attention")
    assert second in ("mamba", "linear_attention")


def test_sizes_that_kernels_dislike_are_a_note_with_the_nearest_good_ones(capsys, tmp_path):
    source = make_model(tmp_path / "m", "llama", intermediate_size=256)
    words = [f"workspace={tmp_path / 'ws'}", f"source.model={source}", "score.importance=random"]
    assert main(["plan", *words, "plan.ffn=150"]) == 0
    note = capsys.readouterr().err
    assert "ffn=150 is no multiple of 64, which fast kernels want" in note
    assert "128" in note
    assert "192" in note
    assert main(["plan", *words, "plan.ffn=192"]) == 0
    assert "fast kernels" not in capsys.readouterr().err


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """The Llama table under another name of the FFN axis, as a user might write it."""
    path = tmp_path / "my_family.yaml"
    path.write_text((TABLES / "llama.yaml").read_text().replace("ffn", "neurons"))
    monkeypatch.setenv(OWN_TABLES, "")
    yield path
    monkeypatch.undo()
    families.cache_clear()


def test_a_table_of_ones_own_is_listed_proven_and_used(capsys, tmp_path, own_table):
    source = make_model(tmp_path / "m", "llama")
    assert main(["families", "llama", f"families.path={own_table}", "--json"]) == 0
    assert "neurons" in json.loads(capsys.readouterr().out)["llama"]["prunable"]
    words = [f"workspace={tmp_path / 'ws'}", f"source.model={source}", f"families.path={own_table}"]
    assert main(["plan", *words, "plan.drop_layers=[0]"]) == 0
    assert "neurons" in json.loads((tmp_path / "ws" / "plan" / "plan.json").read_text())["after"]
    capsys.readouterr()
    line = refused(capsys, "plan", f"workspace={tmp_path}/x", "families.path=nowhere.yaml")
    assert "families.path" in line
    assert "no such table" in line


def test_a_table_that_is_wrong_is_told_by_its_proof(capsys, tmp_path, own_table):
    text = own_table.read_text()
    row = "model.layers.{layer}.mlp.down_proj.weight:"
    line = next(one for one in text.splitlines() if row in one)
    own_table.write_text(
        text.replace(line, line.replace("neurons", "hidden").replace("hidden", "neurons", 1))
    )
    assert main(["families", "llama", f"families.path={own_table}", "--prove"]) != 0
    shutil.copy(TABLES / "llama.yaml", own_table)
    assert main(["families", "llama", f"families.path={own_table}", "--prove"]) == 0
    out = capsys.readouterr().out
    assert "FAILS" not in out.split("\n\n")[-1]
