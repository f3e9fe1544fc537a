"""Sizes that runtimes like: refused where they are asked for, told of where they are not."""

import json

import pytest

from nemo_minitron.cli.main import main
from nemo_minitron.config.plan_config import PlanConfig
from nemo_minitron.families import architecture_of
from nemo_minitron.pruning.serving import served, serving_notes, serving_rules
from nemo_minitron.pruning.size_search import candidates, default_choices
from nemo_minitron.pruning.target_sizes import explicit_targets, target_sizes

LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64,
    "num_key_value_heads": 4, "num_hidden_layers": 8, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model():
    return architecture_of(LLAMA)


def rules(model, *serve):
    return {rule.condition for rule in serving_rules(model, serve)}


def test_rules_are_read_off_the_table(model):
    assert rules(model, "gguf") == {
        "(hidden) % 256 == 0", "(heads * head_dim) % 256 == 0", "(ffn) % 256 == 0",
    }  # fmt: skip
    assert rules(model, "fp8_block", "tp:4") == {
        "(hidden) % 128 == 0", "(heads * head_dim) % 512 == 0", "(kv_heads * head_dim) % 128 == 0",
        "(ffn) % 512 == 0", "(vocab) % 128 == 0", "(heads) % 4 == 0", "(kv_heads) % 4 == 0 or 4 % kv_heads == 0", "(ffn) % 4 == 0",
    }  # fmt: skip
    fused = architecture_of({**LLAMA, "model_type": "phi3", "hidden_size": 1024})
    assert "(heads * head_dim) % 128 == 0" in rules(fused, "fp8_block")


@pytest.mark.parametrize(
    ("serve", "sizes", "said"),
    [
        ("gguf", {"ffn": 3000}, r"gguf wants ffn to be a multiple of 256, found ffn=3000 \(nearest: ffn=2816 or ffn=3072\)"),
        ("fp8_block", {"hidden": 992}, "fp8_block wants hidden to be a multiple of 128, found hidden=992"),
        ("tp:8", {"heads": 12, "hidden": 768}, "tp:8 wants heads to be a multiple of 8, found heads=12 .nearest: heads=8 or heads=16"),
        ("tp:0", {"ffn": 1024}, "expected gguf, fp8_block, tp:N, found 'tp:0'"),
        ("vllm", {"ffn": 1024}, "expected gguf, fp8_block, tp:N, found 'vllm'"),
    ],
)  # fmt: skip
def test_a_plan_keeps_to_them(model, serve, sizes, said):
    with pytest.raises(ValueError, match=said):
        target_sizes(model, PlanConfig(serve=[serve], **sizes))


def test_what_fits_and_what_is_not_cut_passes(model):
    plan = PlanConfig(serve=["gguf", "fp8_block", "tp:2"], ffn=2048, heads=8)
    assert target_sizes(model, plan)["ffn"] == 2048
    odd = architecture_of({**LLAMA, "hidden_size": 960, "head_dim": 60})
    assert target_sizes(odd, PlanConfig(serve=["gguf"], ffn=2048))["hidden"] == 960
    assert "serve" not in explicit_targets(plan)  # an equal plan keeps its fingerprint


def test_a_search_offers_no_other_sizes(model):
    free = candidates(model, default_choices(model, 0.5), 60_000_000, 120_000_000)
    kept = served(model, ["gguf", "tp:4"])
    found = candidates(kept, default_choices(kept, 0.5), 60_000_000, 120_000_000)
    sizes = [{**model.sizes, **one.sizes} for one in found]
    assert sizes and len(found) < len(free)
    assert all(one["ffn"] % 256 == one["hidden"] % 256 == one["heads"] % 4 == 0 for one in sizes)
    assert any(one["hidden"] % 256 for one in ({**model.sizes, **each.sizes} for each in free))


def test_a_note_says_what_a_size_costs(model):
    (line,) = serving_notes(model, {**model.sizes, "ffn": 3200}, [])
    assert "gguf wants ffn to be a multiple of 256" in line and "in a larger type" in line
    assert not serving_notes(model, {**model.sizes, "ffn": 3072}, [])
    assert not serving_notes(model, {**model.sizes, "ffn": 3200}, ["gguf"])


def test_size_tells_and_refuses(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["size", str(tmp_path), "ffn=3000", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ffn"] == 3000 and "note: gguf wants ffn" in err
    assert main(["size", str(tmp_path), "ffn=3000", "serve=[gguf,tp:2]"]) == 2
    assert "size: serve: gguf wants ffn to be a multiple of 256" in capsys.readouterr().err
