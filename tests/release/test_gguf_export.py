"""GGUF out and in: what llama.cpp's converter would write, read back as a source with the same logits."""

import shutil

import pytest
import torch
import transformers

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.checkpoints.gguf_families import gguf_families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.gguf_folder import write_gguf_folder
from nemo_minitron.release.gguf_export import write_gguf
from tests.support.models import make_model

gguf = pytest.importorskip("gguf")

ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
WIDE = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
MORE = {
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 4,
                    "final_logit_softcapping": 5.0},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 4},
    "qwen3": {"rope_parameters": YARN},
    "llama": {"rope_parameters": ROPE, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "tie_word_embeddings": True},
    "smollm3": {"num_hidden_layers": 4},
    "starcoder2": {"use_bias": True, "sliding_window": None},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3},
    "stablelm": {"use_qkv_bias": True},
}  # fmt: skip
"""What makes a tiny model of a family use more of what the table has rows for."""
ROPE_OFF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
PLAIN = {
    "llama": {**ROPE_OFF, "attention_bias": False, "mlp_bias": False},
    "nemotron": {"attention_bias": False, "mlp_bias": False},
    "qwen3": {**ROPE_OFF, "head_dim": 128},
}
"""What transformers reads of these families' files: no biases, no factors, no head of another size."""
THEIRS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "nemotron", "starcoder2", "stablelm")
"""Families whose GGUF files transformers reads itself."""


def made(folder, model_type, tokenizer_folder, **changes):
    settings = {**WIDE, "dtype": "bfloat16", **MORE.get(model_type, {}), **changes}
    make_model(folder, model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for path in tokenizer_folder.glob("*token*"):
        shutil.copy(path, folder / path.name)
    return folder


def written(folder, kinds, source=None):
    return write_gguf(folder, source or folder, "tiny", kinds, "gpt-2", "apache-2.0")


def logits(folder):
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        return load_model(folder, torch.float32)(tokens).logits


def as_source(path, folder):
    folder.mkdir()
    write_gguf_folder(path, folder)
    return folder


@pytest.mark.parametrize("model_type", gguf_families())
def test_a_file_is_a_source_with_the_same_logits(tmp_path, tokenizer_folder, model_type):
    folder = made(tmp_path / "m", model_type, tokenizer_folder)
    files = written(folder, ["bf16", "q8_0"])
    back = as_source(files["bf16"], tmp_path / "back")
    ours, theirs = open_checkpoint(folder), open_checkpoint(back)
    assert theirs.stored_as == "GGUF, BF16, F32"
    assert ours.architecture.sizes == theirs.architecture.sizes
    for name in ours.entries:
        one, other = load_tensor(ours, name), load_tensor(theirs, name)
        assert torch.allclose(one.float(), other.float(), atol=1e-6), name
    assert torch.allclose(logits(folder), logits(back), atol=1e-5)
    small = logits(as_source(files["q8_0"], tmp_path / "small"))
    spread = logits(folder).std()
    assert 0 < (small - logits(folder)).std() < 0.1 * spread


@pytest.mark.parametrize("model_type", THEIRS)
def test_transformers_loads_the_same_from_the_file(tmp_path, tokenizer_folder, model_type):
    folder = made(tmp_path / "m", model_type, tokenizer_folder, **PLAIN.get(model_type, {}))
    path = written(folder, ["q8_0"])["q8_0"]
    back = load_model(as_source(path, tmp_path / "back"))
    other = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    state = other.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name]), name
