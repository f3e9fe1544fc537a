"""The tables on config.json files as published: old and new spellings, nulls, keys nobody reads, rope kinds, windows."""

import json
from collections import Counter

import pytest
import torch
import transformers
from packaging.version import Version

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.proof import TOGETHER, generates, halved, logits_of
from nemo_minitron.proofs.tiny_models import permutation, random_model
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.select import score_shape, select_units
from nemo_minitron.scoring.importance import random_scores
from tests.support.models import INSTALLED, stream
from tests.support.real_configs import FOLDER, published, shrunk

CONFIGS = {
    name: config for name, config in published().items() if config["model_type"] in INSTALLED
}
if Version(transformers.__version__) < Version("5.24"):  # its StableLM has no pad_token_id
    CONFIGS = {name: c for name, c in CONFIGS.items() if c["model_type"] != "stablelm"}
MOST_USED = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "mistral", "mixtral", "phi3",
             "gpt_oss", "nemotron", "nemotron_h")  # fmt: skip


def test_every_family_has_a_published_config_and_the_most_used_have_two():
    found = Counter(config["model_type"] for config in published().values())
    assert set(INSTALLED) <= set(found)
    assert all(found[name] >= 2 for name in MOST_USED)
    assert all(path.stem in found for path in FOLDER.glob("*.yaml"))


def made(config, folder):
    """A model of random weights with the config.json as published, but small."""
    small = shrunk(config)
    random_model(small, folder)
    (folder / "config.json").write_text(json.dumps(small))
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_described_and_cut(tmp_path, name):
    checkpoint = made(CONFIGS[name], tmp_path / "source")
    model, family = checkpoint.architecture, checkpoint.family
    stored = sum(torch.Size(entry.shape).numel() for entry in checkpoint.entries.values())
    assert model_size(model).parameters == stored
    axes = [axis for axis in model.prunable if axis != "layers"]
    before = logits_of(checkpoint.folder)
    moved = logits_of(stream(checkpoint.folder, tmp_path / "moved", permutation(model, axes)))
    assert (before - moved).abs().max() <= 1e-4 * before.abs().max()  # epsilons as published

    targets = halved(family, model.sizes, TOGETHER, axes)
    scores = {axis: random_scores(score_shape(family, model.sizes, axis), 0) for axis in axes}
    keep = select_units(family, scores, model.sizes, targets)
    layers = tuple(range("layers" in model.prunable, model.sizes["layers"]))
    cut = stream(checkpoint.folder, tmp_path / "cut", keep, layers)
    loaded = load_model(cut, torch.float32)
    assert generates(loaded, 3)
    after = open_checkpoint(cut)
    assert after.architecture.sizes == {**targets, "layers": len(layers)}
    known = {key for axis in family.axes.values() for key in (*axis.config, *axis.after)}
    written = {
        *family.axes["layers"].lists,
        *family.axes["layers"].indices,
        *family.axes["layers"].counts,
    }
    left_out = {"dtype", "torch_dtype", "auto_map", "use_mtp"}
    left_out |= set(family.mtp_layers)
    untouched = set(checkpoint.config) - known - written - left_out
    assert {key: after.config[key] for key in untouched} == {
        k: checkpoint.config[k] for k in untouched
    }
