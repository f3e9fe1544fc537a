import json
import struct
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.checkpoints.dtypes import DTYPES
from nemo_minitron.checkpoints.headers import read_header
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.shard_writer import Planned, write_weights
from nemo_minitron.families import families
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.slice import Cut, cut_config
from nemo_minitron.workspace.manifest import hash_file
from tests.support.fuzzing import examples
from tests.support.models import make_model


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_sharded_and_a_single_file_checkpoint_open_alike(tmp_path):
    import transformers

    single = make_model(tmp_path / "single", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(single)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=5000)
    a, b = open_checkpoint(single), open_checkpoint(tmp_path / "sharded")
    assert len({entry.file for entry in b.entries.values()}) > 3
    read_a, read_b = partial(load_tensor, a), partial(load_tensor, b)
    for name in a.entries:
        assert torch.equal(read_a(name), read_b(name))
    assert a.fingerprint != b.fingerprint
    assert open_checkpoint(single).fingerprint == a.fingerprint


def test_two_fine_tunes_of_one_model_are_told_apart(tmp_path):
    a, b = (
        open_checkpoint(make_model(tmp_path / f"{seed}", "llama", seed=seed)) for seed in (0, 1)
    )
    assert a.fingerprint != b.fingerprint
    path = tmp_path / "0" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.01  # a merged adapter
    save_file(tensors, path, {"format": "pt"})
    assert open_checkpoint(tmp_path / "0").fingerprint not in (a.fingerprint, b.fingerprint)


@pytest.mark.parametrize(
    "names", [["../elsewhere.safetensors"], ["/etc/passwd"], [5], [None], [["a"]], []]
)
def test_an_index_that_leads_elsewhere(tmp_path, names):
    folder = make_model(tmp_path / "m", "llama")
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def add_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.vision.weight": torch.ones(2)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json here"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
        (
            lambda f: change_config(f, model_type="t5"),
            "'t5' is not supported; supported families: .*gemma, .*llama, .*families.path",
        ),
        (
            lambda f: change_config(f, intermediate_size=41),
            r"implies shape \[41, 24\], the file holds \[40, 24\]",
        ),
        (lambda f: change_config(f, num_hidden_layers=4), "are missing: model.layers.3"),
        (
            lambda f: change_config(f, hidden_size="big"),
            "expected a positive whole number, found 'big'",
        ),
        (
            lambda f: change_config(f, quantization_config={"quant_method": "gptq"}),
            "quantised .gptq.; dequantise",
        ),
        (truncate, "truncated: expected"),
        (drop_tensor, "1 tensors of family 'llama' are missing: model.layers.1.mlp.up_proj.weight"),
        (add_tensor, "in no row of the table of family 'llama': model.vision.weight"),
        (
            lambda f: change_config(f, num_hidden_layers=2),
            "tensors of layers beyond the 2 of config.json, as model.layers.2",
        ),
        (lambda f: change_config(f, quantization_config="fp8"), "quantised .fp8."),
        (pickle_only, "only pickled weights .pytorch_model.bin."),
        (missing_shard, "model-00001-of-00002.safetensors is listed"),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_file_and_reason(tmp_path, damage, message):
    folder = make_model(tmp_path / "model", "llama")
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@settings(max_examples=examples(150), deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=60).map(lambda t: struct.pack("<Q", len(t.encode())) + t.encode())
)
def test_no_bytes_crash_the_header_reader(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One saved model of every family."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        name: tiny_model(families()[name], families()[name].proofs[0], folder / name)
        for name in ("llama", "gemma3_text", "qwen2_moe", "phi3", "stablelm", "gpt_oss", "smollm3")
    }


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**12)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=examples(300), deadline=None)
@given(data=st.data())
def test_no_config_crashes(tmp_path_factory, tiny, data):
    """Whatever config.json says, opening and cutting end well or with one clear error."""
    name = data.draw(st.sampled_from(sorted(tiny)))
    folder = tiny[name]
    config = json.loads((folder / "config.json").read_text())
    keys = sorted(
        {
            *config,
            "quantization_config",
            "text_config",
            "hybrid_override_pattern",
            "mlp_only_layers",
        }
    )
    changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=3))
    broken = tmp_path_factory.mktemp("fuzz")
    (broken / "config.json").write_text(json.dumps({**config, **changes}))
    (broken / "model.safetensors").symlink_to(folder / "model.safetensors")
    try:
        checkpoint = open_checkpoint(broken)
        cut_config(Cut(checkpoint.architecture, {"hidden": torch.arange(16)}, (0, 2)))
    except ValueError as error:
        assert "config.json" in str(error) or str(broken) in str(error)


@settings(max_examples=examples(200), deadline=None)
@given(data=st.data())
def test_no_header_crashes(tmp_path_factory, tiny, data):
    """A header with one entry changed is refused, or is still the header of the same model."""
    folder = tiny["llama"]
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "all"]))
    value = data.draw(JSON)
    if part == "all" or name == "__metadata__":
        header[name] = value
    else:
        header[name][part] = value
    encoded = json.dumps(header).encode()
    broken = tmp_path_factory.mktemp("fuzz")
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(
        struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :]
    )
    try:
        open_checkpoint(broken)
    except ValueError as error:
        assert str(broken) in str(error)
    else:
        assert name == "__metadata__" or json.loads(raw[8 : 8 + length])[name] == header[name]


def test_the_stream_writes_what_the_library_reads_back(tmp_path):
    torch.manual_seed(0)
    values = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2).double(),
        "d": torch.randn(1, 1).half(),
        "e": torch.zeros(0, 4),
    }
    planned = [
        Planned(name, DTYPES[value.dtype], tuple(value.shape)) for name, value in values.items()
    ]
    hashes = write_weights(tmp_path, planned, values.__getitem__, 10**6)
    assert list(hashes) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    assert hashes["model.safetensors"] == hash_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_below_their_limit_and_the_index_is_exact(tmp_path):
    values = {f"t{i}": torch.full((10, 10), float(i)) for i in range(7)}
    planned = [
        Planned(name, DTYPES[value.dtype], tuple(value.shape)) for name, value in values.items()
    ]
    hashes = write_weights(tmp_path, planned, values.__getitem__, 1000)
    assert list(hashes) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], values[name])


def test_both_spellings_of_dtype_and_rope():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    written = both_spellings({"dtype": "bfloat16", "rope_parameters": rope})
    assert written["torch_dtype"] == "bfloat16"
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    plain = both_spellings(
        {"torch_dtype": "float16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    )
    assert plain["dtype"] == "float16"
    assert "rope_scaling" not in plain
    both = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4},
    }
    gemma = both_spellings({"rope_parameters": both})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
