import pytest

from nemo_minitron.families import Architecture, families
from nemo_minitron.pruning.cost import model_size

NEMOTRON = {
    "model_type": "nemotron",
    "vocab_size": 256000,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


# [P1] Tables 2 and 3; the third decimal as recomputed
@pytest.mark.parametrize(
    ("hidden", "heads", "ffn", "total", "non_embedding"),
    [
        (6144, 48, 24576, 15.629, 12.483),
        (4096, 48, 16384, 8.272, 6.175),
        (3072, 24, 9216, 4.191, 2.618),
    ],
)
def test_the_papers_models(hidden, heads, ffn, total, non_embedding):
    config = {
        **NEMOTRON,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
    }
    size = model_size(Architecture(families()["nemotron"], config))
    assert round(size.parameters / 1e9, 3) == total
    assert round(size.non_embedding / 1e9, 3) == non_embedding


def test_flops_and_cache_by_hand():
    config = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    size = model_size(Architecture(families()["llama"], config), context=100, cache_bytes=2)
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 6) + 10 * 8
    attention = 2 * (
        4 * 4 * 2 * 50
    )  # layers x 4 heads x head_dim x half of the context, 4 FLOPs each
    assert size.flops_per_token == 2 * matrices + attention
    assert (
        size.kv_bytes_per_token == 2 * 2 * 2 * 2 * 2
    )  # keys and values, layers, kv heads, head_dim, bytes


def test_tied_embeddings_count_once_and_cost_the_head_all_the_same():
    config = {**NEMOTRON, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 128}
    untied = model_size(Architecture(families()["nemotron"], config))
    tied = model_size(Architecture(families()["nemotron"], {**config, "tie_word_embeddings": True}))
    assert untied.parameters - tied.parameters == 256000 * 64
    assert untied.non_embedding == tied.non_embedding
    assert untied.flops_per_token == tied.flops_per_token
