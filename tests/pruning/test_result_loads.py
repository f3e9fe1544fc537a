"""What a cut would write is what transformers loads, or is refused before anything is cut."""

import pytest
import torch
import yaml

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import both_spellings, read_config
from nemo_minitron.cli.main import main
from nemo_minitron.config.plan_config import PlanConfig
from nemo_minitron.families import architecture_of, families
from nemo_minitron.families.table import OWN_TABLES, TABLES
from nemo_minitron.models.config_trial import check_config_loads
from nemo_minitron.proofs.tiny_models import tiny_config, tiny_model
from nemo_minitron.pruning.size_search import candidates
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.target_sizes import target_sizes
from tests.support.models import logits, stream

FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
HUB = {
    "rope_scaling": {"type": "longrope", **FACTORS},
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}
SAVED = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS},
    "original_max_position_embeddings": 32,
}
HALF = torch.arange(0, 32, 2)
HEADS = torch.tensor([0, 1, 4, 5]).expand(4, -1)


@pytest.mark.parametrize("rope", [HUB, SAVED])
def test_longrope_ties_hidden_to_heads_in_plan_size_and_search(rope):
    model = architecture_of(tiny_config(families()["phi3"], rope))
    for sizes in ({"hidden": 16}, {"heads": 4}):
        with pytest.raises(ValueError, match="plan: phi3 needs hidden // heads == head_dim, found"):
            target_sizes(model, PlanConfig(**sizes))
    assert target_sizes(model, PlanConfig(hidden=16, heads=4))["hidden"] == 16
    found = candidates(model, {"hidden": [16, 32], "heads": [4, 8]}, 0, 10**9)
    assert sorted((one.sizes["hidden"], one.sizes["heads"]) for one in found) == [(16, 4), (32, 8)]
    assert target_sizes(architecture_of(tiny_config(families()["phi3"], {})), PlanConfig(hidden=16))


def test_a_longrope_model_cut_in_hidden_and_heads_loads_as_it_is_written(tmp_path):
    source = tiny_model(families()["phi3"], HUB, tmp_path / "m")
    target = stream(source, tmp_path / "cut", {"hidden": HALF, "heads": HEADS})
    written = read_config(target)
    # transformers 4.57 refuses any further key
    assert written["rope_scaling"] == {"type": "longrope", **FACTORS}
    assert written["original_max_position_embeddings"] == 32
    before = logits(target)
    (target / "config.json").write_text(
        (target / "config.json").read_text().replace('"rope_scaling"', '"left_out"')
    )
    assert torch.equal(logits(target), before)  # which of the two spellings is read


@pytest.mark.parametrize("own", [{"factor": 3.0}, {"attention_factor": 1.5}])
def test_what_longrope_says_beyond_its_factors_is_not_lost_in_the_older_spelling(own):
    rope = {**SAVED["rope_parameters"], **own}
    written = both_spellings({"max_position_embeddings": 64, "rope_parameters": rope})
    assert written["rope_scaling"].items() >= own.items()


LISTED = ["llama", "phi3", "starcoder2", "mixtral", "qwen3_moe", "granite", "olmo2", "gemma"]


@pytest.mark.parametrize("name", LISTED)
def test_layer_types_that_a_table_does_not_name_are_cut_with_the_layers(name):
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    config = tiny_config(families()[name], {"layer_types": kinds, "sliding_window": 8})
    cut = Cut(architecture_of(config), {}, (0, 1, 3)).result.config
    assert cut["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    check_config_loads(cut, "here")


def test_a_list_with_an_entry_per_layer_that_nobody_knows_is_refused_by_name():
    config = tiny_config(
        families()["llama"], {"eos_token_id": [1, 2, 3, 4], "skip_rate": [0.1] * 4}
    )
    with pytest.raises(
        ValueError, match=r"config.json: skip_rate lists 4 entries, one for each layer"
    ):
        _ = Cut(architecture_of(config), {}, (0, 1)).result
    kept = Cut(architecture_of(config), {}, (0, 1, 2, 3)).result.config
    assert kept["skip_rate"] == [0.1] * 4


def test_what_transformers_would_refuse_ends_the_plan_with_its_whole_reason(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv(OWN_TABLES, "")
    table = yaml.safe_load((TABLES / "phi3.yaml").read_text())
    table["constraints"] = table["constraints"][:2]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(table))
    source = tiny_model(families()["phi3"], HUB, tmp_path / "m")
    assert open_checkpoint(source).architecture.sizes["hidden"] == 32
    try:
        code = main([
            "plan", f"source.model={source}", f"workspace={tmp_path / 'w'}", f"families.path={tmp_path / 'own.yaml'}",
            "score.importance=magnitude", "plan.hidden=16",
        ])  # fmt: skip
    finally:
        families.cache_clear()
    said = capsys.readouterr().err
    assert code == 2 and "would not load the result" in said, said
    assert "short_factor field must have length 2" in said or "must have length 1, got 2" in said
    assert not (tmp_path / "w" / "plan").exists()


@pytest.mark.parametrize(
    ("name", "changes", "kept", "told"),
    [
        ("gemma2", {"num_hidden_layers": 4}, "1,2", "layer_types: its pattern"),
        ("gemma2", {"num_hidden_layers": 4}, "0,1", None),
        ("gemma2", {"num_hidden_layers": 4}, "2,3", None),
        ("smollm3", {"num_hidden_layers": 8}, "1,2,3,4,5,6,7", "no_rope_layers: its pattern"),
        ("llama", {}, "1,3", None),
    ],
)
def test_the_plan_says_where_the_pattern_of_layers_is_no_longer_the_familys(
    tmp_path, capsys, name, changes, kept, told
):
    source = tiny_model(families()[name], changes, tmp_path / "m")
    layers = read_config(source)["num_hidden_layers"]
    gone = [i for i in range(layers) if str(i) not in kept.split(",")]
    words = [f"workspace={tmp_path / 'ws'}", f"source.model={source}", f"plan.drop_layers={gone}"]
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr()
    found = printed.out + printed.err
    assert ("its pattern is that of the kept layers" in found) is (told is not None)
    assert told is None or told in found
