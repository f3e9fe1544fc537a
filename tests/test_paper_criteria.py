"""Criteria of other techniques, restated: what is dead ranks last, and a rotation changes nothing until it is cut."""

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.paper import criteria

LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A Llama with gains, whose second neuron and last head of each layer write nothing."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 1] = 0
        layer.self_attn.o_proj.weight.data[:, -8:] = 0
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, torch.randint(2, 64, (8, 17))


@pytest.mark.parametrize("name", ["llm-pruner", "flap"])
def test_units_that_write_nothing_rank_last(llama, name):
    # of LLM-Pruner a dead unit has no gradient in what feeds it, and no weight in what it would write
    found = criteria.CRITERIA[name](*llama)
    assert found["ffn"].shape == (2, 24) and found["heads"].shape == (2, 4)
    assert (found["ffn"].argmin(1) == 1).all() and (found["heads"].argmin(1) == 3).all()


def test_peak_to_peak_is_the_range_of_the_rows_of_gate_and_up(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama[0])
    mlp = model.model.layers[1].mlp
    expected = sum(
        max(w.weight[5].tolist()) + abs(min(w.weight[5].tolist()))
        for w in (mlp.gate_proj, mlp.up_proj)
    )
    assert float(criteria.CRITERIA["optipfair"](*llama)["ffn"][1, 5]) == pytest.approx(expected)


def test_a_rotated_model_is_the_same_until_it_is_cut(llama, tmp_path):
    folder, tokens_NS = llama
    turned = criteria.rotated(folder, tmp_path / "turned", 32, lambda: tokens_NS)
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folder, turned))
    with torch.no_grad():
        assert torch.allclose(before(tokens_NS).logits, after(tokens_NS).logits, atol=1e-4)
    assert not torch.allclose(before.lm_head.weight, after.lm_head.weight, atol=1e-2)
    variances = criteria.CRITERIA["slicegpt"](turned, tokens_NS)["hidden"]
    assert (variances.diff() <= 0).all()
