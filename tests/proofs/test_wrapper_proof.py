"""The tables of multimodal models are proven, and a wrong one is found out."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.families import families, wrappers
from nemo_minitron.families.grammar import parse_row
from nemo_minitron.proofs.wrapper_proof import cut_whole, image_logits, prove_wrapper, tiny_whole
from nemo_minitron.pruning.slice_wrapper import check_surroundings
from tests.support.models import INSTALLED

CASES = [
    (name, kind)
    for name, wrapper in wrappers().items()
    for kind, family in wrapper.text.items()
    if family in INSTALLED
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_table_holds_around_every_text_model(name, kind):
    wrapper = wrappers()[name]
    assert wrapper.text[kind] in families()
    found = list(prove_wrapper(wrapper, kind))
    assert len(found) == 3 and all(finding.holds for finding in found), found


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_a_row_that_is_left_out_is_found_out(name):
    wrapper = wrappers()[name]
    present = [row for row in wrapper.rows if not row[0].pattern.startswith(r"model\.multi")]
    with pytest.raises((ValueError, RuntimeError)):
        rows = tuple(row for row in present if row != present[0])
        assert not all(
            each.holds
            for each in prove_wrapper(replace(wrapper, rows=rows), next(iter(wrapper.text)))
        )
        raise ValueError("a proof failed")


def test_a_row_whose_dimensions_are_swapped_is_found_out():
    wrapper = wrappers()["gemma3"]
    rows = tuple((pattern, parse_row("hidden any")) for pattern, _ in wrapper.rows)
    with pytest.raises(ValueError, match="hidden channels along dimension 0"):
        list(prove_wrapper(replace(wrapper, rows=rows), "gemma3_text"))


def test_a_quantised_one_is_cut_into_plain_parts(tmp_path):
    """As Ministral 3 is published: text model, towers and projector in FP8 with a scale each."""
    wrapper = wrappers()["mistral3"]
    plain = tiny_whole(wrapper, "mistral", tmp_path / "plain")
    folder = shutil.copytree(plain, tmp_path / "fp8")
    tensors, found = load_file(plain / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or "embed" in name:
            found[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        found[name] = (tensor / scale).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
        tensors[name] = (found[name].float() * scale).to(torch.bfloat16)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    checkpoint = open_checkpoint(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(load_tensor(checkpoint, name), tensors[f"language_model.{name}"])
    keep = {"hidden": torch.arange(0, 32, 2)}
    whole = cut_whole(checkpoint, keep, tmp_path / "half", (0, 2, 3))
    assert "quantization_config" not in json.loads((whole / "config.json").read_text())
    after = load_file(whole / "model.safetensors")
    assert not [name for name in after if "scale" in name]
    last = "multi_modal_projector.linear_2.weight"
    assert after[last].shape == (16, 16) and after[last].dtype == torch.bfloat16
    rows = (tensors[last][::2][:, None] == after[last][:, :1, None]).any(2).any(1)
    assert rows.all()  # each row is made of the kept one's numbers
    assert image_logits(whole, wrapper).isfinite().all()


@pytest.mark.parametrize("kind, text", [("mistral3", "mistral"), ("gemma3", "gemma3_text")])
def test_names_as_transformers_has_them_in_memory_are_cut_alike(tmp_path, kind, text):
    wrapper = wrappers()[kind]
    folder = tiny_whole(wrapper, text, tmp_path / "published")
    keep = {"hidden": torch.arange(0, 32, 2)}
    expected = image_logits(cut_whole(open_checkpoint(folder), keep, tmp_path / "half"), wrapper)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        inside = name.removeprefix("language_model.")
        if inside.startswith("lm_head."):
            tensors[inside] = tensor
        elif inside != name:
            tensors[f"model.language_model.{inside.removeprefix('model.')}"] = tensor
        else:
            tensors[f"model.{name}"] = tensor
    saved = shutil.copytree(folder, tmp_path / "saved")
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(saved)
    check_surroundings(checkpoint)
    half = cut_whole(checkpoint, keep, tmp_path / "other-half")
    assert torch.equal(image_logits(half, wrapper), expected)


def test_other_parts_of_which_no_tensor_is_known_are_refused(tmp_path):
    wrapper = wrappers()["mistral3"]
    folder = tiny_whole(wrapper, "mistral", tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("multi_modal_projector", "bridge"): each for name, each in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"of mistral3 expected multi_modal_projector.linear_1.weight"
    ):
        check_surroundings(open_checkpoint(folder))


@pytest.mark.skipif("gemma4_text" not in INSTALLED, reason="this transformers has no Gemma 4")
def test_weights_that_are_called_scales_are_no_quantisers(tmp_path):
    """Gemma 4 has scales of its own, of experts, of attention in sounds and of pictures."""
    wrapper = wrappers()["gemma4"]
    folder = tiny_whole(wrapper, "gemma4_text", tmp_path / "whole")
    tensors, found = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if ".language_model.layers." in name and name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 448
            found |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    own = [name for name in tensors if name.endswith("_scale")]
    assert own and len(found) > len(tensors)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    checkpoint = open_checkpoint(folder)
    assert set(own) <= {*checkpoint.around.entries, *checkpoint.around.stored}
    whole = cut_whole(checkpoint, {"hidden": torch.arange(0, 32, 2)}, tmp_path / "half")
    after = load_file(whole / "model.safetensors")
    for name in own:
        if name in checkpoint.around.entries:
            assert torch.equal(after[name], tensors[name])
    assert image_logits(whole, wrapper).isfinite().all()


def test_channels_that_are_not_the_kept_ones_are_found_out():
    """A width that fits is not enough: an image must reach the channels that stay."""
    wrapper = wrappers()["gemma3"]
    rows = tuple((pattern, parse_row("any inner")) for pattern, _ in wrapper.rows)
    found = list(prove_wrapper(replace(wrapper, rows=rows, inner=("inner",)), "gemma3_text"))
    assert [finding.holds for finding in found] == [True, False, True]
