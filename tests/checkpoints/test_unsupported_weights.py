"""Weights that are not a plain causal LM are refused by name, with what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.models.causal_lm import load_model
from tests.support.models import make_model

LAYER = "model.layers.0.mlp.up_proj"


def add(folder, *names):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, **{n: torch.ones(2) for n in names}},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def replace_weight(folder, **suffixes):
    """What quantisers do: the weight goes, other tensors take its place."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}.weight"]
    tensors |= {f"{LAYER}.{name}": value for name, value in suffixes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "kind", "advice"),
    [
        (
            lambda f: add(f, f"{LAYER}.weight_scale_inv"),
            "fp8 block or tensor scales",
            "dequantise it first",
        ),
        (
            lambda f: replace_weight(
                f, qweight=torch.ones(4, dtype=torch.int32), scales=torch.ones(4)
            ),
            "GPTQ/AWQ weights",
            "dequantise it first",
        ),
        (lambda f: add(f, f"{LAYER}.weight.absmax"), "bitsandbytes weights", "dequantise it first"),
        (lambda f: add(f, f"{LAYER}.SCB"), "bitsandbytes weights", "dequantise it first"),
        (
            lambda f: add(f, "model.layers.0.mlp.experts.down_proj_blocks"),
            "mxfp4 blocks",
            "dequantise",
        ),
        (
            lambda f: add(f, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
            "LoRA adapter weights",
            "merge the adapter first",
        ),
        (
            lambda f: add(f, "model.vision_tower.patch.weight"),
            "a vision or audio tower",
            "the text model",
        ),
        (
            lambda f: add(f, "visual.blocks.0.attn.qkv.weight"),
            "a vision or audio tower",
            "the text model",
        ),
        (
            lambda f: add(f, "mtp.layers.0.eh_proj.weight"),
            "multi-token prediction",
            "remove them first",
        ),
        (
            lambda f: add(f, "model.layers.3.self_attn.q_proj.weight"),
            "multi-token prediction",
            "remove",
        ),
    ],
)
def test_tensors_that_do_not_belong_are_known_by_name(tmp_path, spoil, kind, advice):
    folder = make_model(tmp_path / "m", "llama")
    spoil(folder)
    with pytest.raises(ValueError, match=kind) as caught:
        open_checkpoint(folder)
    assert advice in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_stored_in_eight_bits_are_refused_even_without_scales(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="F8_E4M3"):
        open_checkpoint(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "eetq", "hqq"])
def test_a_config_that_declares_quantisation(tmp_path, method):
    folder = make_model(tmp_path / "m", "llama")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=rf"quantised \({method}\); dequantise it first"):
        open_checkpoint(folder)


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"a LoRA adapter, not a model .*merge_and_unload"):
        open_checkpoint(tmp_path)


def test_what_peft_writes(tmp_path):
    """An adapter folder, a model saved with its adapter inside, and the merged model, which is fine."""
    import peft
    import transformers

    folder = make_model(tmp_path / "m", "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge it into its base model first"):
        open_checkpoint(tmp_path / "adapter")
    tensors = {name: tensor.contiguous() for name, tensor in adapted.state_dict().items()}
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    (tmp_path / "whole" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="holds LoRA adapter weights"):
        open_checkpoint(tmp_path / "whole")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    open_checkpoint(tmp_path / "merged")


def test_block_scales_as_published_fp8_checkpoints_have_them(tmp_path):
    """Every projection in float8 with a float32 scale per block: read where config.json declares it."""
    folder = make_model(tmp_path / "m", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().max() / 448
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="dequantise it first"):
        open_checkpoint(folder)
    path = folder / "config.json"
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    assert open_checkpoint(folder).stored_as == "FP8, blocks of 128 x 128"


def test_a_distributed_checkpoint_of_nemo_2_is_refused_with_the_conversion(tmp_path):
    for name in ("weights", "context"):
        (tmp_path / "nemo2" / name).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"a distributed checkpoint of NeMo 2.*nemo llm export path="
    ):
        open_checkpoint(tmp_path / "nemo2")


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    """transformers would load the adapter, and the base model that it names, with the model."""
    folder = make_model(tmp_path / "m", "llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    for read in (open_checkpoint, load_model):
        with pytest.raises(
            ValueError, match=r"a LoRA adapter, beside a model .*remove the adapter's files"
        ):
            read(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "owner/kernel@main:function"},
        {"attn_implementation": {"": "paged|owner/kernel"}},
        {"text_config": {"deep": [{"_attn_implementation_internal": "owner/kernel"}]}},
        {"experts_implementation": "owner/kernel"},
    ],
)
def test_a_kernel_from_the_hub_is_refused_by_its_key(tmp_path, entry):
    folder = make_model(tmp_path / "m", "llama")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **entry}))
    for read in (open_checkpoint, load_model):
        with pytest.raises(
            ValueError, match=r"config\.json: _?\w+_implementation\w*='.*owner/kernel.*never run"
        ):
            read(folder)
    path.write_text(json.dumps({**config, "attn_implementation": "eager"}))
    assert load_model(folder).config._attn_implementation == "eager"
    path.write_text(json.dumps({**config, "attn_implementation": "flash_attention_2"}))
    open_checkpoint(folder)  # to prune it, nothing of it is run
    with pytest.raises(
        ValueError, match="flash-attn is not installed here; install it, or remove the key"
    ):
        load_model(folder)
