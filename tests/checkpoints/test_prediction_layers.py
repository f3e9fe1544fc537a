"""Multi-token prediction layers behind a model are left out with a note, and no longer refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import SINGLE, open_checkpoint
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.plan_file import make_plan, mtp_note, read_plan, write_plan
from tests.support.models import logits, stream
from tests.support.runs import minitron

LAYER = "model.layers.4."


def with_predictions(folder, name="glm4_moe", changes=None):
    """A tiny model with one prediction layer behind its own, as published checkpoints have it."""
    family = families()[name]
    tiny_model(family, changes or family.proofs[0], folder)
    tensors = load_file(folder / SINGLE)
    last = {n.replace("model.layers.3.", LAYER): t for n, t in tensors.items() if ".3." in n[:16]}
    more = {"eh_proj.weight": (32, 64), "enorm.weight": (32,), "hnorm.weight": (32,), "shared_head.norm.weight": (32,)}  # fmt: skip
    extra = {n: t.clone() for n, t in last.items()} | {
        LAYER + n: torch.ones(s) for n, s in more.items()
    }
    if name == "qwen3_next":
        extra = {"mtp.fc.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)}
    save_file({**tensors, **extra}, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return folder, extra


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next"])
def test_prediction_layers_are_left_out(tmp_path, name):
    folder, extra = with_predictions(tmp_path / "source", name)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.predictions) == set(extra)
    assert not set(checkpoint.entries) & set(extra)
    load_model(folder)  # in memory they are left out as well
    cut = stream(folder, tmp_path / "cut", {}, (0, 1, 2, 3))
    assert set(open_checkpoint(cut).entries) == set(checkpoint.entries)
    assert not open_checkpoint(cut).predictions
    if families()[name].mtp_layers:
        assert json.loads((cut / "config.json").read_text())["num_nextn_predict_layers"] == 0
    (tmp_path / "plain").mkdir()
    plain = tiny_model(families()[name], families()[name].proofs[0], tmp_path / "plain")
    assert torch.equal(logits(cut), logits(plain))


def test_the_plan_says_so(tmp_path):
    folder, extra = with_predictions(tmp_path / "source")
    arguments = [f"workspace={tmp_path / 'run'}", f"source.model={folder}", "plan.drop_layers=[3]"]
    done = minitron("plan", *arguments)
    assert done.returncode == 0, done.stderr
    said = f"{len(extra)} tensors of multi-token prediction layers, as {LAYER}"
    assert said in " ".join((done.stdout + done.stderr).split())
    assert said in json.loads((tmp_path / "run/plan/plan.json").read_text())["mtp"]


def test_a_plan_without_them_is_as_it_was(tmp_path):
    checkpoint = open_checkpoint(tiny_model(families()["llama"], {}, tmp_path / "m"))
    assert mtp_note(checkpoint) == ""
    write_plan(tmp_path, make_plan(checkpoint.architecture, {}, (0, 1)))
    assert "mtp" not in json.loads((tmp_path / "plan.json").read_text())


def test_quantised_prediction_layers_are_refused(tmp_path):
    folder, extra = with_predictions(tmp_path / "m")
    tensors = load_file(folder / SINGLE)
    name = next(iter(extra))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match="is stored as I8; dequantise the model first"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "number", "axis"),
    [("qwen3_next", 0, "linear_key_heads"), ("falcon_h1", 0, "mamba_head_dim"), ("ernie4_5_moe", 1, "expert_ffn")],
)  # fmt: skip
def test_sizes_that_follow_others_are_no_gap_in_a_plan(tmp_path, name, number, axis):
    """Value heads go with key heads, a width with its heads, a shared expert that a model lacks with the routed."""
    family = families()[name]
    checkpoint = open_checkpoint(tiny_model(family, family.proofs[number], tmp_path / "m"))
    model = checkpoint.architecture
    half = torch.arange(model.sizes[axis] // 2)
    owners = [model.sizes[owner] for owner in family.ranked_per(axis)]
    keep = {axis: half.expand(*owners, -1).contiguous()}
    (tmp_path / "plan").mkdir()
    write_plan(tmp_path / "plan", make_plan(model, keep, (0, 1, 2, 3)))
    plan = read_plan(tmp_path / "plan")
    followers = [n for n, a in family.axes.items() if a.follows and plan.after[n] < plan.before[n]]
    assert followers
    load_model(stream(checkpoint.folder, tmp_path / "cut", dict(plan.keep)))
