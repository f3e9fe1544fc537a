"""Published configurations of multimodal models: where their text model lies, and how large it is."""

import json

import pytest

from nemo_minitron.checkpoints.hf_config import raw_config, read_config
from nemo_minitron.families import architecture_of, with_text, wrapper_of, wrappers
from nemo_minitron.families.wrapper import load_wrapper
from nemo_minitron.models.config_trial import config_object
from nemo_minitron.pruning.cost import model_size

GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
QWEN3_VL_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
    "tie_word_embeddings": True, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 9728, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl",
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
MISTRAL_SMALL_3_1 = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "image_token_index": 10,
    "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
    "torch_dtype": "bfloat16", "vision_feature_layer": -1,
    "text_config": {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True, "vocab_size": 131072,
    },
    "vision_config": {
        "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "gelu", "hidden_size": 1024, "image_size": 1540,
        "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
    },
}  # fmt: skip
PUBLISHED = {
    "gemma3-4b": (GEMMA3_4B, 3_880_263_168),
    "qwen3-vl-4b": (QWEN3_VL_4B, 4_022_468_096),
    "mistral-small-3.1": (MISTRAL_SMALL_3_1, 23_572_403_200),
}


def stored(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_model_of_a_published_config_has_its_published_size(name, tmp_path):
    config, parameters = PUBLISHED[name]
    alone = read_config(stored(tmp_path, config))
    assert model_size(architecture_of(alone)).parameters == parameters
    assert raw_config(tmp_path) == config
    assert "mrope_section" not in json.dumps(alone)
    config_object(alone)  # transformers reads it as a causal LM's


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_cut_changes_the_text_part_and_what_follows_it_only(name, tmp_path):
    config, _ = PUBLISHED[name]
    before = read_config(stored(tmp_path, config))
    model = architecture_of(before)
    cut = model.resized({**model.sizes, "hidden": 1024, "ffn": 512})
    wrapper = wrapper_of(config)
    assert wrapper is not None
    after = with_text(wrapper, config, before, cut.config, cut.sizes)
    changed = {key for key in after if after[key] != config.get(key)}
    assert changed - {"tie_word_embeddings"} == {
        "text_config",
        *(path.split(".")[0] for path in wrapper.config),
    }
    text = after["text_config"]
    assert {key for key in text if text[key] != config["text_config"].get(key)} - {"tie_word_embeddings"} == {
        "hidden_size", "intermediate_size",
    }  # fmt: skip
    for path in wrapper.config:
        part, key = path.split(".")
        assert after[part][key] == 1024
    assert read_config(stored(tmp_path, after)) == {
        **before,
        "hidden_size": 1024,
        "intermediate_size": 512,
    }


def test_names_lead_there_and_back():
    for wrapper in wrappers().values():
        for inside in ("model.layers.3.mlp.up_proj.weight", "lm_head.weight"):
            for start in wrapper.names:
                name = wrapper.stored_name(inside, [f"{start}x"])
                assert wrapper.text_name(name) == inside
        assert wrapper.text_name("vision_tower.x") is None


def test_an_unknown_key_of_a_table_is_refused(tmp_path):
    table = tmp_path / "x.yaml"
    table.write_text("model_type: x\nprefixes: {}\n")
    with pytest.raises(ValueError, match=r"unknown keys .'prefixes'"):
        load_wrapper(table)
