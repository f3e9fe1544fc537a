"""Quantised checkpoints are read as the bfloat16 weights that they stand for, as transformers reads them."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.pruning.head_merge import HeadMerge
from tests.support.models import make_model, stream

BLOCK = 16
"""Side of a scale's block in these small models."""


def declare(folder, settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


def rewrite(folder, change):
    """Replaces tensors of a saved model: ``change`` gives some for each, or None to keep it."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found |= change(name, tensor) or {name: tensor}
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return found


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
"""Multiples of the block, as far as transformers wants them to be."""


def linear(name):
    return "_proj.weight" in name


def eight_bits(tensor, block=(BLOCK, BLOCK)):
    """FP8 numbers of a matrix and a scale for each block."""
    rows, columns = tensor.shape
    padded = torch.zeros(-(-rows // block[0]) * block[0], -(-columns // block[1]) * block[1])
    padded[:rows, :columns] = tensor.float()
    parts = padded.reshape(-(-rows // block[0]), block[0], -1, block[1])
    scales = parts.abs().amax((1, 3)) / 448
    numbers = (parts / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scales


def fp8_model(folder):
    make_model(folder, "llama", dtype="bfloat16", **SIZES)

    def change(name, tensor):
        if not linear(name):
            return {name: tensor.to(torch.bfloat16)}
        numbers, scales = eight_bits(tensor)
        return {name: numbers, f"{name}_scale_inv": scales}

    rewrite(folder, change)
    declare(
        folder,
        {
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
        },
    )
    return folder


def mxfp4_model(folder):
    make_model(folder, "gpt_oss", dtype="bfloat16", hidden_size=32, intermediate_size=32, num_local_experts=3,
               num_experts_per_tok=2)  # fmt: skip
    generator = torch.Generator().manual_seed(1)

    def change(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor.to(torch.bfloat16)}
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(115, 125, shape[:-1], dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    rewrite(folder, change)
    declare(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def theirs(folder, settings):
    """What transformers makes of the same folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings
    )


def make_plain(folder, settings, plain):
    """The folder of the same weights in bfloat16."""
    plain.mkdir()
    save_file(theirs(folder, settings).state_dict(), plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def same_weights(ours, other):
    ours, other = ours.state_dict(), other.state_dict()
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def same_logits(one, other):
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(one.eval()(tokens).logits, other.eval()(tokens).logits)


FORMATS = {
    "fp8": (
        fp8_model,
        lambda: transformers.FineGrainedFP8Config(dequantize=True),
        "blocks of 16 x 16",
    ),
    "mxfp4": (mxfp4_model, lambda: transformers.Mxfp4Config(dequantize=True), "MXFP4"),
}


@pytest.fixture(params=FORMATS)
def quantised(request, tmp_path):
    make, settings, words = FORMATS[request.param]
    return make(tmp_path / "m"), settings(), words


def test_weights_are_those_that_transformers_makes(quantised):
    folder, settings, words = quantised
    checkpoint = open_checkpoint(folder)
    assert words in checkpoint.stored_as
    assert "quantization_config" not in checkpoint.config
    model, other = load_model(folder), theirs(folder, settings)
    same_weights(model, other)
    same_logits(model, other)
    state = other.state_dict()
    for name, entry in checkpoint.entries.items():
        assert entry.dtype == "BF16"
        assert torch.equal(load_tensor(checkpoint, name), state[name]), name


def test_pruning_streams_it_into_a_plain_smaller_model(quantised, tmp_path, monkeypatch):
    from nemo_minitron.pruning import stream as streaming

    folder, settings, _ = quantised
    axis = "expert_ffn" if "expert_ffn" in open_checkpoint(folder).architecture.sizes else "ffn"
    sizes = open_checkpoint(folder).architecture.sizes
    owners = (sizes["layers"], sizes["experts"]) if "experts" in sizes else (sizes["layers"],)
    kept = torch.arange(1, 1 + sizes[axis] // 2).expand(*owners, -1)
    plain = make_plain(folder, settings, tmp_path / "plain")
    monkeypatch.setattr(
        streaming, "BLOCK_BYTES", 256
    )  # several blocks, which end inside of a block of scales
    monkeypatch.setattr(streaming, "GAP_BYTES", 0)
    keep = {axis: kept, "hidden": torch.tensor([30, 1, 2, 3, *range(8, 28)])}
    stream(folder, tmp_path / "ours", keep, (0, 2))
    stream(plain, tmp_path / "other", keep, (0, 2))
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    same_weights(load_model(tmp_path / "ours"), load_model(tmp_path / "other"))


@pytest.mark.parametrize("how", ["paper", "average_query"])
def test_query_heads_are_merged_in_the_weights_that_it_stands_for(tmp_path, how):
    folder = fp8_model(tmp_path / "m")
    settings = FORMATS["fp8"][1]()
    plain = make_plain(folder, settings, tmp_path / "plain")
    keep = {"heads": torch.tensor([[0, 3], [1, 2], [0, 2]]), "hidden": torch.arange(4, 30)}
    merge = HeadMerge(how, torch.tensor([[0, 0, 3, 3], [1, 1, 2, 2], [0, 0, 2, 2]]))
    stream(folder, tmp_path / "ours", keep, merge=merge)
    stream(plain, tmp_path / "other", keep, merge=merge)
    same_weights(load_model(tmp_path / "ours"), load_model(tmp_path / "other"))
    stream(folder, tmp_path / "unmerged", keep)
    name = "model.layers.0.self_attn.q_proj.weight"
    merged, unmerged = (
        load_file(tmp_path / one / "model.safetensors")[name] for one in ("ours", "unmerged")
    )
    assert not torch.equal(merged, unmerged)


def test_a_scale_covers_its_block_and_no_more_at_the_edges_of_a_matrix(tmp_path):
    """192 rows in blocks of 128 are 128 and 64, where a grid alone could be read as twice 96."""
    folder = make_model(tmp_path / "m", "llama", dtype="bfloat16", intermediate_size=24)
    want = {}

    def change(name, tensor):
        if not linear(name):
            return None
        numbers, scales = eight_bits(tensor)
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        want[name] = (numbers.float() * spread[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
        return {name: numbers, f"{name}_scale_inv": scales}

    rewrite(folder, change)
    declare(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    checkpoint = open_checkpoint(folder)
    assert want
    for name, tensor in want.items():
        assert torch.equal(load_tensor(checkpoint, name), tensor), name


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize(
    ("kind", "bits", "symmetric"),
    [("int", 8, True), ("int", 8, False), ("int", 4, True), ("float", 8, True)],
)
def test_what_compressed_tensors_writes(tmp_path, strategy, kind, bits, symmetric):
    """By its own compressor, and read as its own decompression makes it."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    del library
    more = {"group": {"group_size": 8}, "block": {"block_structure": [16, 16]}}.get(strategy, {})
    weights = QuantizationArgs(
        num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, **more
    )
    name = f"{kind}-quantized"
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=name)
    compressor, want = BaseCompressor.get_value_from_registry(name), {}
    folder = make_model(
        tmp_path / "m", "llama", dtype="bfloat16", hidden_size=24, intermediate_size=40
    )
    generator = torch.Generator().manual_seed(0)

    def change(key, tensor):
        if not linear(key):
            return None
        rows, columns = tensor.shape
        shape = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // 8),
                 "block": (-(-rows // 16), -(-columns // 16))}[strategy]  # fmt: skip
        top = 448 if kind == "float" else 2 ** (bits - 1) - 1
        scales = (torch.rand(shape, generator=generator) + 0.5) * float(tensor.abs().max()) / top
        state = {"weight": tensor.bfloat16(), "weight_scale": scales.bfloat16()}
        if not symmetric:
            state["weight_zero_point"] = torch.randint(
                -3, 3, shape, dtype=torch.int8, generator=generator
            )
        packed = compressor.compress(dict(state), scheme)
        want[key] = compressor.decompress(dict(packed), scheme)["weight"].bfloat16()
        module = key.removesuffix("weight")
        return {f"{module}{part}": value.contiguous() for part, value in packed.items()}

    rewrite(folder, change)
    args = json.loads(scheme.model_dump_json())
    declare(
        folder,
        {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": args}},
    )
    checkpoint = open_checkpoint(folder)
    assert name in checkpoint.stored_as
    for key, tensor in want.items():
        assert torch.equal(load_tensor(checkpoint, key), tensor), key


UP = "model.layers.0.mlp.up_proj.weight"


def edit(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.pop("put", {}).items():
        tensors[name] = value
    for name in changes.pop("drop", ()):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: edit(f, drop=[f"{UP}_scale_inv"]),
            rf"{UP} is there and {UP}_scale_inv is missing",
        ),
        (lambda f: edit(f, drop=[UP]), rf"{UP}_scale_inv is there and {UP} is missing"),
        (
            lambda f: edit(f, put={f"{UP}_scale_inv": torch.ones(2, 2)}),
            r"scales, F32 \[2, 2\], do not fit F8_E4M3 \[48, 32\] in blocks of 16 x 16",
        ),
        (
            lambda f: edit(f, put={f"{UP}_scale_inv": torch.ones(3, 2, dtype=torch.int8)}),
            r"scales, I8 \[3, 2\], do not fit",
        ),
        (
            lambda f: edit(
                f,
                put={
                    UP: torch.ones(48, 16).to(torch.float8_e4m3fn),
                    f"{UP}_scale_inv": torch.ones(3, 1),
                },
            ),
            r"config.json implies shape \[48, 32\], the file holds \[48, 16\]",
        ),
        (
            lambda f: declare(f, {"quant_method": "fp8", "weight_block_size": 128}),
            r"expected a block of two whole numbers, as \[128, 128\], found 128",
        ),
    ],
)
def test_a_damaged_checkpoint_in_fp8(tmp_path, spoil, said):
    folder = fp8_model(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ValueError, match=said) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_in_mxfp4(tmp_path):
    folder = mxfp4_model(tmp_path / "m")
    name = "model.layers.0.mlp.experts.down_proj"
    scales = load_file(folder / "model.safetensors")[f"{name}_scales"]
    edit(folder, put={f"{name}_scales": scales[:, 1:].contiguous()})
    with pytest.raises(
        ValueError, match=rf"{name}: expected U8 blocks .*found U8 \[3, 32, 1, 16\] and U8"
    ):
        open_checkpoint(folder)
    edit(folder, drop=[f"{name}_scales"])
    with pytest.raises(ValueError, match=rf"{name}_blocks is there and {name}_scales is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors pack-quantized"),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized",
             "transform_config": {"config_groups": {"R1": {}}}},
            "transform_config",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized",
             "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ({"quant_method": "compressed-tensors"}, "without a format"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path, settings, said):
    folder = make_model(tmp_path / "m", "llama")
    declare(folder, settings)
    for opened in (open_checkpoint, load_model):
        with pytest.raises(
            ValueError, match=rf"weights are quantised \(.*{said}.*\); dequantise it first"
        ):
            opened(folder)


def test_the_fingerprint_is_that_of_what_is_stored(tmp_path):
    folder = fp8_model(tmp_path / "m")
    before = open_checkpoint(folder).fingerprint
    edit(
        folder,
        put={f"{UP}_scale_inv": load_file(folder / "model.safetensors")[f"{UP}_scale_inv"] * 2},
    )
    assert open_checkpoint(folder).fingerprint != before
