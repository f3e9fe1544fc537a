"""Qwen3.5's mixtures as published: the experts of a layer in one tensor, in every stage and in what goes out."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import SINGLE, load_tensor, open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.families import families, layers_behind, wrappers
from nemo_minitron.families.grammar import parse_row
from nemo_minitron.models.causal_lm import load_model, save_model
from nemo_minitron.proofs.proof import described, logits_of, permutations
from nemo_minitron.proofs.tiny_models import in_memory_names, tiny_model
from nemo_minitron.proofs.wrapper_proof import image_logits, tiny_whole
from nemo_minitron.pruning.plan_file import cut_of, read_plan
from nemo_minitron.pruning.slice_predictions import CutPredictions
from nemo_minitron.pruning.slice_wrapper import CutSurroundings, write_whole
from nemo_minitron.scoring.magnitude import magnitudes
from tests.support.models import INSTALLED, logits
from tests.support.runs import settings

FAMILY = "qwen3_5_moe_text"
pytestmark = pytest.mark.skipif(FAMILY not in INSTALLED, reason="this transformers has none")
LAYER = "model.language_model.layers.1.mlp.experts."


def stacked(tensors):
    """The experts of each layer in one tensor: gates above ups, as published."""
    parts, others = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)_proj\.weight", name)
        if found:
            parts.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = tensor
        else:
            others[name] = tensor
    for begin, experts in parts.items():
        inner = [torch.cat([experts[e]["gate"], experts[e]["up"]]) for e in sorted(experts)]
        others[f"{begin}gate_up_proj"] = torch.stack(inner)
        others[f"{begin}down_proj"] = torch.stack([experts[e]["down"] for e in sorted(experts)])
    return others


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer_folder):
    """A tiny Qwen3.5 with a vision tower, experts and a prediction layer, named as the hub's."""
    folder = tmp_path_factory.mktemp("published") / "qwen"
    tiny_whole(wrappers()["qwen3_5_moe"], FAMILY, folder, vocab_size=304)
    tensors = stacked(load_file(folder / SINGLE))
    assert tensors[f"{LAYER}gate_up_proj"].shape == (4, 32, 32)
    behind = layers_behind(open_checkpoint(folder).architecture, 1)
    made = {name: torch.randn(shape) for name, _, shape in behind.architecture.tensors()}
    save_file({**tensors, **stacked(made)}, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def pruned(published, corpus, tmp_path_factory):
    place = tmp_path_factory.mktemp("pruned") / "run"
    own = [
        "plan.hidden=16",
        "plan.experts=3",
        "plan.expert_ffn=8",
        "plan.drop_layers=[0]",
        "plan.mtp=keep",
    ]
    gone = ("plan.", "evaluate.", "trainer.", "optim.", "distill.", "exp_manager.")
    given = [word for word in settings(place, published, corpus) if not word.startswith(gone)]
    assert main(["download", *given]) == 0
    for stage in ("score", "plan", "prune"):
        assert main([stage, *given, *own, "score.depth=none"]) == 0, stage
    return place


def test_the_result_holds_exact_slices_under_the_same_names(published, pruned):
    before, after = load_file(published / SINGLE), load_file(pruned / "pruned" / SINGLE)
    keep = load_file(pruned / "plan" / "keep.safetensors")
    experts, neurons, hidden = keep["experts"][1], keep["expert_ffn"][1], keep["hidden"]
    assert neurons.shape == (4, 8) and len(experts) == 3
    for new, old in enumerate(experts.tolist()):
        both = torch.cat([neurons[old], 16 + neurons[old]])
        want = before[f"{LAYER}gate_up_proj"][old][both][:, hidden]
        assert torch.equal(after["model.layers.0.mlp.experts.gate_up_proj"][new], want)
        want = before[f"{LAYER}down_proj"][old][hidden][:, neurons[old]]
        assert torch.equal(after["model.layers.0.mlp.experts.down_proj"][new], want)
    assert not any(re.search(r"experts\.\d", name) for name in after)


def test_what_is_saved_and_exported_keeps_them_and_loads(published, pruned, tmp_path):
    source = open_checkpoint(published)
    (tmp_path / "student").mkdir()
    folder = pruned / "pruned"
    save_model(load_model(folder), tmp_path / "student", open_checkpoint(folder).config)
    student = open_checkpoint(tmp_path / "student")
    assert set(student.entries) == set(open_checkpoint(folder).entries)
    cut = cut_of(read_plan(pruned / "plan"), source.architecture)
    around, behind = CutSurroundings(source, cut), CutPredictions(source, cut, magnitudes)
    export = tmp_path / "export"
    export.mkdir()
    write_whole(student, around, export, lambda _: torch.float32, None, 10**9, behind)
    config = {**student.config, **behind.config}
    text = around.config(type(student.architecture)(student.family, config))
    (export / "config.json").write_text(json.dumps(text))
    assert text["text_config"]["mtp_num_hidden_layers"] == 1
    assert image_logits(export, wrappers()["qwen3_5_moe"]).isfinite().all()  # loads strictly
    names = {re.sub(r"layers\.\d+", "layers.#", name) for name in load_file(export / SINGLE)}
    asked = {re.sub(r"layers\.\d+", "layers.#", name) for name in load_file(published / SINGLE)}
    assert names == asked
    again = open_checkpoint(export)
    assert again.predictions["mtp.layers.0.mlp.experts.gate_up_proj"].shape == (3, 16, 16)
    assert torch.equal(logits(tmp_path / "student"), logits(pruned / "pruned"))


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """One model, its experts apart and in one tensor."""
    work = tmp_path_factory.mktemp("twins")
    family = families()[FAMILY]
    one = open_checkpoint(tiny_model(family, family.proofs[0], work / "apart"))
    return one, open_checkpoint(in_memory_names(one, work / "together"))


def test_both_spellings_are_one_model(twins):
    one, other = twins
    assert len(other.entries) < len(one.entries)
    assert one.architecture.sizes == other.architecture.sizes
    found = [magnitudes(c.architecture, c.entries, partial(load_tensor, c)) for c in twins]
    assert found[0].keys() == found[1].keys()
    for axis, scores in found[0].items():
        assert torch.allclose(scores, found[1][axis], rtol=1e-12), axis


def test_some_of_each_are_refused(twins, tmp_path):
    one, other = twins
    tensors = load_file(one.folder / SINGLE)
    name = "model.layers.0.mlp.experts.down_proj"
    more = load_file(other.folder / SINGLE)[name]
    (tmp_path / "config.json").write_text((one.folder / "config.json").read_text())
    save_file({**tensors, name: more}, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match="tensors of family 'qwen3_5_moe_text' are missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("end", "wrong"),
    [
        ("gate_up_proj", "experts (still | expert_ffn) hidden"),
        ("gate_up_proj", "experts (expert_ffn 2) hidden"),
        ("gate_up_proj", "experts (expert_ffn | expert_ffn) wide"),
        ("down_proj", "experts hidden still"),
        ("down_proj", "experts wide expert_ffn"),
    ],
)
def test_a_wrong_row_is_found(twins, tmp_path, end, wrong):
    other = twins[1]
    family = other.family
    rows = tuple(
        replace(row, dims=parse_row(wrong)) if row.pattern.endswith(f"experts.{end}") else row
        for row in family.rows
    )
    still = {
        name: replace(family.axes[like], name=name, fixed=True)
        for name, like in (("still", "expert_ffn"), ("wide", "hidden"))
    }
    before = logits_of(other.folder)
    axes = [axis for axis in other.architecture.prunable if axis != "layers"]
    for table, holds in ((family, True), (replace(family, rows=rows, axes={**family.axes, **still}), False)):  # fmt: skip
        found = permutations(described(other, table), axes, tmp_path, alone=False, before=before)
        assert [finding.holds for finding in found] == [holds]
