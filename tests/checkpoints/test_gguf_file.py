"""GGUF files as they come: every type of block, sets of files, and damaged ones."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.checkpoints.gguf_families import gguf_family, metadata_of
from nemo_minitron.checkpoints.gguf_file import read_gguf
from nemo_minitron.models.gguf_folder import gguf_config, write_gguf_folder
from tests.support.models import make_model, stream
from tests.support.runs import minitron

gguf = pytest.importorskip("gguf")
Q = gguf.GGMLQuantizationType
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KEYS = {"context_length": 64, "embedding_length": 256, "block_count": 2, "feed_forward_length": 512,
        "attention.head_count": 4, "attention.head_count_kv": 2}  # fmt: skip


def tensors(form):
    """A tiny Llama's tensors: quantised, or, where Python has no quantiser, random blocks with sane scales."""
    draw = np.random.default_rng(0)

    def matrix(rows, columns):
        kind = Q[form]
        block, width = gguf.GGML_QUANT_SIZES[kind]
        if form in BLOCKS:
            data = draw.integers(0, 256, (rows, columns // block * width), np.uint8)
            parts = data.reshape(-1, width)
            for at in HALVES[form]:  # the halves that scale a block must be numbers
                parts[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            return data, kind
        return gguf.quantize(draw.standard_normal((rows, columns)).astype(np.float32), kind), kind

    vector = draw.standard_normal(256).astype(np.float32)
    found = {"token_embd.weight": matrix(96, 256), "output_norm.weight": (vector, Q.F32)}
    for layer in range(2):
        shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
                  "ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}  # fmt: skip
        found |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = (vector, Q.F32)
    return found


HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 numbers of a block are."""


def write(path, form="Q4_0", change=lambda keys, found: None, split=0):
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    keys, found = dict(KEYS), tensors(form)
    change(keys, found)
    for key, value in keys.items():
        writer.add_uint32(
            key if "." in key and key.startswith(("llama", "general")) else f"llama.{key}", value
        )
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, (data, kind) in found.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def folder_of(path, folder):
    folder.mkdir()
    write_gguf_folder(path, folder)
    return folder


@pytest.mark.parametrize("form", [*QUANTISED, *BLOCKS, "F16", "F32", "BF16"])
def test_every_type_of_block(tmp_path, form):
    """As the package gguf makes numbers of it, with the halves of each head's rows back in their places."""
    path = write(tmp_path / "m.gguf", form)
    checkpoint = open_checkpoint(folder_of(path, tmp_path / "m"))
    dtype = {"F16": "F16", "F32": "F32"}.get(form, "BF16")
    assert {entry.dtype for entry in checkpoint.entries.values()} == {dtype}
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def want(name):
        tensor = reader[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    up = load_tensor(checkpoint, "model.layers.1.mlp.up_proj.weight")
    assert torch.equal(up, want("blk.1.ffn_up.weight").to(up.dtype))
    query = load_tensor(checkpoint, "model.layers.0.self_attn.q_proj.weight")
    order = want("blk.0.attn_q.weight").reshape(4, 32, 2, 256).transpose(1, 2).reshape(256, 256)
    assert torch.equal(query, order.to(query.dtype))
    assert torch.isfinite(query).all()


def test_pruning_reads_rows_of_blocks(tmp_path, monkeypatch):
    from nemo_minitron.pruning import stream as streaming

    folder = folder_of(write(tmp_path / "m.gguf", "Q5_0"), tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(streaming, "GAP_BYTES", 0)
    kept, hidden = torch.arange(0, 512, 3), torch.arange(4, 252)
    keep = {"ffn": kept.expand(2, -1), "hidden": hidden}
    small = open_checkpoint(stream(folder, tmp_path / "small", keep))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(load_tensor(small, name), load_tensor(checkpoint, name)[kept][:, hidden])
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(load_tensor(small, name), load_tensor(checkpoint, name)[:, hidden])
    assert not (tmp_path / "small" / "gguf.json").exists()


def test_a_set_of_files_is_one_model(tmp_path):
    whole = open_checkpoint(folder_of(write(tmp_path / "m.gguf"), tmp_path / "m"))
    write(tmp_path / "s.gguf", split=7)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) == math.ceil(20 / 7)
    checkpoint = open_checkpoint(folder_of(parts[1], tmp_path / "s"))
    assert checkpoint.entries.keys() == whole.entries.keys()
    for name in whole.entries:
        assert torch.equal(load_tensor(checkpoint, name), load_tensor(whole, name))
    parts[2].unlink()
    with pytest.raises(ValueError, match=rf"{parts[2].name}: no such file"):
        open_checkpoint(tmp_path / "s")


def cut(path):
    path.write_bytes(path.read_bytes()[:-40_000])


def short(path):
    path.write_bytes(path.read_bytes()[:300])


def other_type(path):
    """The first tensor's type, in the table, becomes none that exists."""
    data, name = bytearray(path.read_bytes()), b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 16
    data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(bytes(data))


def without(name):
    return lambda keys, found: found.pop(name)


def key(name, value):
    return lambda keys, found: keys.update({name: value})


@pytest.mark.parametrize(
    ("change", "spoil", "said"),
    [
        (None, cut, r"truncated: .* ends at byte [\d,]+, the file has [\d,]+"),
        (None, short, "truncated, or no GGUF file"),
        (None, lambda path: path.write_bytes(b"GGUG" + path.read_bytes()[4:]), "does not begin with GGUF"),
        (None, other_type, "token_embd.weight is of ggml type 99, which is not read; expected F32"),
        (without("blk.1.ffn_up.weight"), None, "1 tensors of family 'llama' are missing: model.layers.1.mlp.up_proj"),
        (key("embedding_length", 224), None, r"config.json implies shape \[96, 224\], the file holds \[96, 256\]"),
        (key("expert_count", 4), None, "key llama.expert_used_count is missing"),
        (key("attention.clamp_kqv", 4), None, "llama.attention.clamp_kqv=4 is not known here"),
        (key("vocab_size", 97), None, "llama.vocab_size: expected 96, found 97"),
        (
            lambda keys, found: found.update({"blk.0.extra.weight": (np.ones(4, np.float32), Q.F32)}),
            None,
            "1 tensors of which family 'llama' has none, as blk.0.extra.weight",
        ),
        (key("block_count", 2**31), None, "layers"),
    ],
)  # fmt: skip
def test_a_damaged_file(tmp_path, change, spoil, said):
    path = write(tmp_path / "m.gguf", change=change or (lambda keys, found: None))
    if spoil is not None:
        spoil(path)
    with pytest.raises(ValueError, match=said) as caught:
        open_checkpoint(folder_of(path, tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_another_file_in_its_place(tmp_path):
    path = write(tmp_path / "m.gguf")
    folder = folder_of(path, tmp_path / "m")
    before = open_checkpoint(folder).fingerprint
    write(path, "Q8_0")
    with pytest.raises(
        ValueError, match=r"another file than the one that .*gguf.json was made for"
    ):
        open_checkpoint(folder)
    shutil.rmtree(folder)
    assert open_checkpoint(folder_of(path, tmp_path / "m")).fingerprint != before


def test_the_fingerprint_sees_the_weights(tmp_path):
    one = open_checkpoint(folder_of(write(tmp_path / "m.gguf"), tmp_path / "m")).fingerprint

    def change(_, found):
        data, kind = found["blk.0.ffn_up.weight"]
        found["blk.0.ffn_up.weight"] = (np.ascontiguousarray(data[::-1]), kind)

    other = write(tmp_path / "o.gguf", change=change)
    assert read_gguf(other).digest == read_gguf(tmp_path / "m.gguf").digest
    assert open_checkpoint(folder_of(other, tmp_path / "o")).fingerprint != one


def test_the_command_line_refuses_in_one_line(tmp_path):
    path = write(tmp_path / "m.gguf")
    cut(path)
    for words in (
        ("size", str(path)),
        ("download", f"source.model={path}", f"workspace={tmp_path / 'w'}"),
    ):
        done = minitron(*words)
        assert done.returncode == 2, done.stderr[-2000:]
        assert done.stderr.strip().count("\n") == 0 and "truncated" in done.stderr


def test_another_architecture_is_refused_by_name(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"architecture 'falcon' is not read from GGUF; expected one of gemma"
    ):
        write_gguf_folder(tmp_path / "m.gguf", folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def header_of(folder, architecture, keys, more=None):
    """A file with metadata and embeddings alone."""
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    keys = {
        "context_length": 8192, "embedding_length": 64, "block_count": 2, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6, **keys, **(more or {}),
    }  # fmt: skip
    for key, value in keys.items():
        kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, keys["embedding_length"]), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


@pytest.mark.parametrize(
    ("given", "scaling"),
    [
        ({}, None),
        ({"factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),  # llama.cpp's default
        ({"factor": 1.0}, None),
        ({"type": "linear"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "none", "factor": 4.0}, None),
    ],
)
def test_a_scaling_without_a_type_is_linear(tmp_path, given, scaling):
    path = header_of(
        tmp_path,
        "llama",
        {"feed_forward_length": 64, "rope.dimension_count": 16},
        {f"rope.scaling.{key}": value for key, value in given.items()},
    )
    assert gguf_config(path).get("rope_scaling") == scaling


@pytest.mark.parametrize(
    ("architecture", "layers", "hidden", "scalar"),
    [
        ("gemma2", 46, 4608, 144),
        ("gemma2", 42, 3584, 128),
        ("gemma3", 62, 5376, 168),
        ("gemma3", 34, 2560, 128),
    ],
)
def test_attention_is_scaled_as_llama_cpp_does(tmp_path, architecture, layers, hidden, scalar):
    """It knows Gemma's 27B by its layers: 1 / sqrt(n_embd / n_head) there, of the head's size elsewhere."""
    keys = {
        "block_count": layers, "feed_forward_length": 64, "attention.head_count": 32, "attention.head_count_kv": 16,
        "attention.key_length": 128, "attention.value_length": 128, "attention.sliding_window": 4096,
        "embedding_length": hidden,
    }  # fmt: skip
    path = header_of(tmp_path, architecture, keys)
    config = gguf_config(path)
    assert "rope_scaling" not in config
    assert (config["query_pre_attn_scalar"], config["head_dim"]) == (scalar, 128)
    table = gguf_family(config["model_type"], "here")
    whole = transformers.AutoConfig.for_model(**config).to_dict()
    assert dict(key[::2] for key in metadata_of(table, whole, "here"))["embedding_length"] == hidden
    with pytest.raises(ValueError, match="takes for granted: query_pre_attn_scalar"):
        list(metadata_of(table, {**whole, "query_pre_attn_scalar": 99}, "here"))
