"""GGUF out and in: what llama.cpp's converter would write, read back as a source with the same logits."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.checkpoints.gguf_families import gguf_families
from nemo_minitron.checkpoints.gguf_file import read_gguf
from nemo_minitron.checkpoints.gguf_weights import _expert
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.gguf_folder import write_gguf_folder
from nemo_minitron.release.gguf_export import _compare, check_gguf, write_gguf
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
FILL = "head_dim * num_attention_heads == hidden_size"
SLIDING, FULL = "sliding_attention", "full_attention"
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
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True,
                  "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 6},
}  # fmt: skip
"""What makes a tiny model of a family use more of what the table has rows for."""
ROPE_OFF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
PLAIN = {
    "llama": {**ROPE_OFF, "attention_bias": False, "mlp_bias": False},
    "nemotron": {"attention_bias": False, "mlp_bias": False},
    "qwen3": {**ROPE_OFF, "head_dim": 128},
    "qwen3_moe": {"moe_intermediate_size": 768},
}
"""What transformers reads of these families' files: no biases, no factors, no head of another size."""
THEIRS = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "nemotron",
    "starcoder2",
    "stablelm",
    "qwen3_moe",
)
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


def test_a_folder_named_from_the_working_folder_is_written(tmp_path, tokenizer_folder, monkeypatch):
    made(tmp_path / "m", "llama", tokenizer_folder)
    monkeypatch.chdir(tmp_path)
    (file,) = written(Path("m"), ["bf16"]).values()
    assert file.is_file()


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
    bound = (
        0.3 if "experts" in ours.architecture.present else 0.1
    )  # some token goes to another expert
    assert 0 < (small - logits(folder)).std() < bound * spread


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


def test_all_experts_of_a_layer_lie_in_one_tensor_and_routers_are_float32(
    tmp_path, tokenizer_folder
):
    folder = made(tmp_path / "m", "mixtral", tokenizer_folder)
    path = written(folder, ["bf16"])["bf16"]
    model, ours = gguf.GGUFReader(path), open_checkpoint(folder)
    kept = {tensor.name: tensor for tensor in model.tensors}
    assert model.fields["llama.expert_count"].contents() == 4
    gates = kept["blk.1.ffn_gate_exps.weight"]
    assert gates.data.shape[0] == 4 and gates.tensor_type.name == "BF16"
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    want = torch.stack([load_tensor(ours, name.format(expert)) for expert in range(4)])
    assert gates.data.tobytes() == want.view(torch.uint8).numpy().tobytes()
    assert kept["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    stored = read_gguf(path).tensors["blk.1.ffn_gate_exps.weight"]
    with pytest.raises(ValueError, match="expected 8 experts along the first dimension, found"):
        _expert(stored, 0, 8, "blk.1.ffn_gate_exps.weight")


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "not mlp_only_layers"),
        ("qwen2_moe", {"norm_topk_prob": True}, "not norm_topk_prob"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv == None"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act == 'silu'; found hidden_act=gelu"),
        (
            "qwen2",
            {"hidden_size": 48},
            f"{FILL}; found head_dim=4, hidden_size=48, num_attention_heads=8",
        ),
        ("qwen2", {"num_attention_heads": 4}, FILL),
        ("qwen2_moe", {"hidden_size": 48}, FILL),
        ("gemma2", {"layer_types": [SLIDING, FULL, FULL]}, "full attention in every N-th layer"),
        (
            "gemma3_text",
            {"layer_types": [*[SLIDING] * 5, FULL, FULL]},
            "found every_nth=[5], full_attention=[5, 6]",
        ),
        (
            "gemma3_text",
            {"layer_types": [*[SLIDING, FULL] * 3, FULL]},
            "found every_nth=[1, 3, 5], full_attention=",
        ),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_refused(
    tmp_path, tokenizer_folder, model_type, changes, said
):
    folder = made(tmp_path / "m", model_type, tokenizer_folder, **changes)
    with pytest.raises(ValueError, match=re.escape(said)):
        check_gguf(open_checkpoint(folder), ["bf16"], "gpt-2")


@pytest.mark.parametrize(
    ("model_type", "windows", "period"),
    [
        ("gemma2", "S F S F S", None),  # llama.cpp's own for the architecture
        ("gemma2", "S S F S", 3),
        ("gemma2", "F F F", 1),
        ("gemma2", "S S S", 4),
        ("gemma3_text", "S S S S S F S", None),
        ("gemma3_text", "S S S S", None),
        ("gemma3_text", "S F S F S F", 2),
    ],
)
def test_layers_with_a_window_are_one_number_as_llama_cpp_reads_them(
    tmp_path, tokenizer_folder, model_type, windows, period
):
    kinds = [{"S": SLIDING, "F": FULL}[kind] for kind in windows.split()]
    changes = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    folder = made(tmp_path / "m", model_type, tokenizer_folder, **changes)
    check_gguf(open_checkpoint(folder), ["bf16"], "gpt-2")
    path = written(folder, ["bf16"])["bf16"]
    fields = gguf.GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    stated = fields.get(f"{architecture}.attention.sliding_window_pattern")
    if stated is not None:  # a list is passed over
        assert stated.types == [gguf.GGUFValueType.UINT32]
    assert (stated and stated.contents()) == period
    number = period or {"gemma2": 2, "gemma3": 6}[architecture]
    # llama.cpp, llama-hparams.cpp: set_swa_pattern
    assert [kind == SLIDING for kind in kinds] == [
        layer % number < number - 1 for layer in range(len(kinds))
    ]
    back = as_source(path, tmp_path / "back")
    assert open_checkpoint(back).config["layer_types"] == kinds
    assert torch.allclose(logits(folder), logits(back), atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "key", "value", "said"),
    [
        ("qwen2", {}, "qwen2.attention.head_count", 4, "says heads 4, and .* has 8"),
        (
            "gemma2",
            {"layer_types": [SLIDING, SLIDING, FULL]},
            "gemma2.attention.sliding_window_pattern",
            2,
            "says layer_types .*, and .* has ",
        ),
    ],
)
def test_a_file_whose_metadata_describes_another_model_is_not_reported_good(
    tmp_path, tokenizer_folder, model_type, changes, key, value, said
):
    folder = made(tmp_path / "m", model_type, tokenizer_folder, **changes)
    path = written(folder, ["bf16"])["bf16"]
    _compare(path, open_checkpoint(folder))
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[key].parts[-1][0] = value
    reader.data.flush()
    with pytest.raises(RuntimeError, match=said):
        _compare(path, open_checkpoint(folder))


def test_a_folder_written_again_has_the_tokenizer_that_it_has_now(tmp_path, tokenizer_folder):
    folder = made(tmp_path / "m", "llama", tokenizer_folder)
    tokens = []
    for _ in range(2):
        path = written(folder, ["bf16"])["bf16"]
        tokens.append(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents())
        content = json.loads((folder / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        vocab["t"], vocab["h"] = vocab["h"], vocab["t"]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    assert tokens[0] != tokens[1] and sorted(tokens[0]) == sorted(tokens[1])


def test_the_docs_name_every_family_that_is_written():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page[page.index("| family | architecture |") :].split("\n\n")[0].splitlines()[2:]
    told = {}
    for row in table:
        names, architectures = (cell.split(", ") for cell in row.strip("| ").split(" | ")[:2])
        each = architectures * len(names) if len(architectures) == 1 else architectures
        told |= dict(zip(names, each, strict=True))
    assert told == {name: family.architecture for name, family in gguf_families().items()}


def test_longrope_comes_back_with_its_factors(tmp_path, tokenizer_folder):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.05],
            "long_factor": [2.0, 4.1]}  # fmt: skip
    changes = {
        "rope_parameters": rope,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 1.0,
    }
    folder = made(tmp_path / "m", "phi3", tokenizer_folder, **changes)
    path = written(folder, ["bf16"])["bf16"]
    assert "rope_factors_long.weight" in read_gguf(path).tensors
    assert gguf.GGUFReader(path).fields["phi3.rope.scaling.attn_factor"].contents() > 1
    back = as_source(path, tmp_path / "back")
    found = open_checkpoint(back).config["rope_scaling"]
    assert (found["short_factor"], found["long_factor"]) == ([1.0, 1.05], [2.0, 4.1])
    assert torch.allclose(logits(folder), logits(back), atol=1e-5)  # 24 tokens: the long factors
    odd = made(tmp_path / "o", "phi3", tokenizer_folder, **{**changes, "rope_parameters": {**rope, "attention_factor": 3.0}})  # fmt: skip
    with pytest.raises(ValueError, match=r"attention_factor 3\.0 cannot be written as GGUF"):
        check_gguf(open_checkpoint(odd), ["bf16"], "gpt-2")
