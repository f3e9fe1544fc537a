"""What query heads that go leave in those that stay: exact where it must be, the same wherever it is done."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.config.plan_config import PlanConfig
from nemo_minitron.evaluation.sorted_teacher import SortedTeacher
from nemo_minitron.families import architecture_of, families, find_row, wrappers
from nemo_minitron.proofs.tiny_models import tiny_config, tiny_model
from nemo_minitron.proofs.wrapper_proof import tiny_whole
from nemo_minitron.pruning import stream
from nemo_minitron.pruning.head_merge import (
    GONE,
    HEADS,
    QUERY,
    HeadMerge,
    attention_rows,
    check_head_merge,
    merged_into,
)
from nemo_minitron.pruning.plan_file import read_plan
from nemo_minitron.pruning.select import complete_targets, score_shape, select_units
from nemo_minitron.pruning.slice import Cut, cut_tensor, pieces
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.pruning.target_sizes import explicit_targets, target_sizes
from nemo_minitron.scoring.importance import random_scores
from tests.support.chosen_families import CHOSEN
from tests.support.models import logits, make_model
from tests.support.runs import refused

HOW = ("paper", "sum_output", "average_query")


def grouped(family):
    """The first of a table's configurations in which several heads share a group's keys; biases where it has some."""
    found = [changes for changes in family.proofs if "num_key_value_heads" not in changes]
    return next((changes for changes in found if changes.get("attention_bias")), found[0])


def mergeable(name):
    """Whether the heads of a family's tiny model can be merged."""
    family = families()[name]
    model = architecture_of(tiny_config(family, family.proofs[0]))
    try:
        attention_rows(model, "sum_output")
    except ValueError:
        return False
    return True


MERGEABLE = sorted(name for name in families() if mergeable(name))
ALONE = [
    name for name in MERGEABLE if "heads * head_dim == hidden" not in families()[name].constraints
]
"""Families whose heads may go while all hidden channels stay."""


def cut_with(checkpoint, how, seed=0, layers=None, **sizes):
    """A cut of a model to sizes, its heads merged by random scores; ``how`` None: not merged."""
    family, before = checkpoint.family, checkpoint.architecture.sizes
    targets = complete_targets(family, before, sizes)
    scores = {
        axis: random_scores(score_shape(family, before, axis), seed + number)
        for number, axis in enumerate(family.prunable)
    }
    keep = select_units(family, scores, before, {k: v for k, v in targets.items() if k != "layers"})
    into = merged_into(scores[HEADS], keep, "kv_heads", before["kv_heads"])
    every = tuple(range(before["layers"])) if layers is None else layers
    merge = None if how is None else HeadMerge(how, into)
    return Cut(checkpoint.architecture, keep, every, merge=merge), scores


def written(checkpoint, cut, folder):
    folder.mkdir()
    write_pruned(checkpoint, [(folder, cut)], 10**9)
    return folder


def test_the_least_important_head_that_stays_takes_in_the_most_important_that_goes():
    scores = torch.tensor([[0.0, 3, 1, 2, 9, 7, 8, 6], [5, 5, 5, 5, 1, 2, 3, 4]])
    keep = {HEADS: torch.tensor([[1, 3, 4, 6], [0, 1, 6, 7]])}
    into = merged_into(scores, keep, "kv_heads", 2)
    assert into.tolist() == [[1, 1, 3, 3, 4, 6, 6, 4], [0, 1, 1, 0, 7, 6, 6, 7]]
    # more go than stay: the count starts over
    into = merged_into(scores, {HEADS: torch.tensor([[1, 4], [0, 7]])}, "kv_heads", 2)
    assert into.tolist() == [[1, 1, 1, 1, 4, 4, 4, 4], [0, 0, 0, 0, 7, 7, 7, 7]]
    # groups that go take their heads along
    keep = {HEADS: torch.tensor([[4, 6], [0, 1]]), "kv_heads": torch.tensor([[1], [0]])}
    into = merged_into(scores, keep, "kv_heads", 2)
    assert into.tolist() == [[GONE] * 4 + [4, 6, 6, 4], [0, 1, 1, 0] + [GONE] * 4]


def test_the_formulas_by_hand(tmp_path):
    """Four heads of one group, 4 to 3: the heads by importance are 2, 0, 3, 1, so 1 goes into 3."""
    source = make_model(
        tmp_path / "m", "llama", num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=1,
        attention_bias=True,
    )  # fmt: skip
    checkpoint = open_checkpoint(source)
    keep = {HEADS: torch.tensor([[0, 2, 3]])}
    into = merged_into(torch.tensor([[3.0, 1, 4, 2]]), keep, "kv_heads", 1)
    before = load_file(source / "model.safetensors")
    start = "model.layers.0.self_attn"
    q = before[f"{start}.q_proj.weight"].unflatten(0, (4, 4))
    b = before[f"{start}.q_proj.bias"].unflatten(0, (4, 4))
    o = before[f"{start}.o_proj.weight"].unflatten(1, (4, 4))
    expected = {
        "paper": (2 * q[3] - q[1], 2 * b[3] - b[1], o[:, 3]),
        "sum_output": (q[3], b[3], o[:, 3] + o[:, 1]),
        "average_query": ((q[3] + q[1]) / 2, (b[3] + b[1]) / 2, o[:, 3] + o[:, 1]),
    }
    for how, (query, bias, output) in expected.items():
        cut = Cut(checkpoint.architecture, keep, (0,), merge=HeadMerge(how, into))
        after = load_file(written(checkpoint, cut, tmp_path / how) / "model.safetensors")
        found = after[f"{start}.q_proj.weight"].unflatten(0, (3, 4))
        assert torch.equal(found[:2], q[[0, 2]])
        assert torch.equal(found[2], query), how
        assert torch.equal(after[f"{start}.q_proj.bias"].unflatten(0, (3, 4))[2], bias), how
        assert torch.equal(after[f"{start}.o_proj.weight"].unflatten(1, (3, 4))[:, 2], output), how
        for kept in ("k_proj.weight", "v_proj.bias", "o_proj.bias"):
            assert torch.equal(after[f"{start}.{kept}"], before[f"{start}.{kept}"])


def with_twins(folder, keep_heads, into):
    """Gives every head that goes the queries of the one that it goes into."""
    checkpoint = open_checkpoint(folder)
    tensors, sizes = load_file(folder / "model.safetensors"), checkpoint.architecture.sizes
    roles = attention_rows(checkpoint.architecture, "sum_output")
    for name, tensor in tensors.items():
        row, units = find_row(checkpoint.family, name)
        if roles.get(row.pattern) == QUERY:
            queries = tensor[: sizes[HEADS] * sizes["head_dim"]].unflatten(0, (sizes[HEADS], -1))
            queries.copy_(queries[into[units["layer"]]].clone())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", [name for name in MERGEABLE if name in CHOSEN and name in ALONE])
def test_heads_that_attend_alike_are_merged_in_every_family_without_a_difference(name, tmp_path):
    """Two heads of a group with the same queries read the same: their outputs add up."""
    family = families()[name]
    source = tiny_model(family, grouped(family), tmp_path / "m")
    checkpoint = open_checkpoint(source)
    groups = checkpoint.architecture.sizes["kv_heads"]
    cut, _ = cut_with(checkpoint, "sum_output", heads=2 * groups)
    with_twins(source, cut.keep[HEADS], cut.merge.into_LU)
    checkpoint, expected = open_checkpoint(source), logits(source)
    for how in ("sum_output", "average_query"):
        merged, _ = cut_with(checkpoint, how, heads=2 * groups)
        found = logits(written(checkpoint, merged, tmp_path / how))
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5), (found - expected).abs().max()
    plain, _ = cut_with(checkpoint, None, heads=2 * groups)
    assert (logits(written(checkpoint, plain, tmp_path / "none")) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("block", [1, 300, 2 * 2**20])
@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen2", torch.bfloat16), ("phi3", torch.float64), ("nemotron_h", torch.float16)]
)  # fmt: skip
def test_the_stream_merges_as_slices_in_memory_whatever_the_blocks(
    tmp_path, monkeypatch, name, dtype, block
):
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(stream, "GAP_BYTES", block // 4)
    family = families()[name]
    source = tiny_model(family, family.proofs[0], tmp_path / "m")
    tensors = {k: v.to(dtype) for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(source)
    cuts, folders = [], []
    for how in (*HOW, None):  # in one pass, beside one that merges nothing
        cut, _ = cut_with(checkpoint, how, heads=4, hidden=16)
        cuts.append(cut)
        folders.append(tmp_path / str(how))
        folders[-1].mkdir()
    write_pruned(checkpoint, list(zip(folders, cuts, strict=True)), 10**9)
    differ = set()
    for folder, cut in zip(folders, cuts, strict=True):
        found = load_file(folder / "model.safetensors")
        for piece in pieces(cut, list(checkpoint.entries)):
            expected = cut_tensor(load_tensor(checkpoint, piece.source), piece, cut.before)
            assert torch.equal(found[piece.name], expected), (folder.name, piece.name)
            if piece.mix is not None:
                differ.add((folder.name, piece.name.split(".")[-2]))
    query = "qkv_proj" if name == "phi3" else "q_proj"
    assert differ == {
        ("paper", query), ("sum_output", "o_proj"), ("average_query", query), ("average_query", "o_proj"),
    }  # fmt: skip


def test_a_text_model_in_a_wrapper_is_merged_as_by_itself(tmp_path):
    source = tiny_whole(wrappers()["gemma3"], "gemma3_text", tmp_path / "m")
    checkpoint = open_checkpoint(source)
    assert checkpoint.around is not None
    cut, _ = cut_with(checkpoint, "average_query", heads=4)
    found = load_file(written(checkpoint, cut, tmp_path / "pruned") / "model.safetensors")
    before = {name: load_tensor(checkpoint, name) for name in checkpoint.entries}
    name = "model.layers.1.self_attn.o_proj.weight"
    kept, into = int(cut.keep[HEADS][1, 0]), cut.merge.into_LU[1]
    members = [head for head in range(8) if int(into[head]) == kept]
    expected = before[name].unflatten(1, (8, -1))[:, members].sum(1)
    assert len(members) == 2
    assert torch.allclose(found[name].unflatten(1, (4, -1))[:, 0], expected)


@pytest.mark.parametrize("name", ["llama", "phi3", "nemotron_h"])
@pytest.mark.parametrize("how", HOW)
def test_a_view_of_the_sorted_teacher_merges_as_the_checkpoint_does(name, how, tmp_path):
    family = families()[name]
    source = tiny_model(family, family.proofs[0], tmp_path / "m")
    checkpoint = open_checkpoint(source)
    _, scores = cut_with(checkpoint, how, heads=4)
    teacher, plain = (
        SortedTeacher(checkpoint, scores, torch.float32, None, each) for each in (how, "none")
    )
    tokens, every = torch.arange(20)[None], range(checkpoint.architecture.sizes["layers"])
    for number, sizes in enumerate(({HEADS: 4}, {HEADS: 2, "kv_heads": 1})):
        cut, _ = cut_with(checkpoint, how, **sizes)
        expected = logits(written(checkpoint, cut, tmp_path / f"pruned{number}"))
        with torch.inference_mode():
            found = teacher.candidate(sizes, every)(tokens).logits
            unmerged = plain.candidate(sizes, every)(tokens).logits
        assert torch.allclose(found, expected, atol=5e-4), (found - expected).abs().max()
        assert not torch.allclose(unmerged, expected, atol=1e-2)
    with torch.inference_mode():  # no head goes inside a group: none is merged
        for sizes in ({}, {"kv_heads": 1}):
            expected = plain.candidate(sizes, every)(tokens).logits
            assert torch.equal(teacher.candidate(sizes, every)(tokens).logits, expected)


def test_the_stage_writes_what_it_merges_and_says_so(tmp_path, capsys):
    source = make_model(tmp_path / "m", "llama")
    words = [f"source.model={source}", "score.importance=magnitude", "plan.heads=3"]
    said = {}
    for how in ("none", "average_query"):
        place = tmp_path / how
        capsys.readouterr()
        assert main(["prune", f"workspace={place}", *words, f"plan.head_merge={how}"]) == 0
        said[how] = json.loads((place / "plan" / "plan.json").read_text())
        plan = read_plan(place / "plan")
        assert set(plan.keep) == {HEADS}
        if how == "none":
            assert "head_merge" not in said[how]
            assert plan.merge is None
            continue
        assert said[how]["head_merge"] == how
        checkpoint = open_checkpoint(source)
        cut = Cut(checkpoint.architecture, plan.keep, plan.layers_kept, merge=plan.merge)
        expected = load_file(
            written(checkpoint, cut, tmp_path / f"{how}-own") / "model.safetensors"
        )
        found = load_file(place / "pruned" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert main(["plan", f"workspace={place}", *words, f"plan.head_merge={how}"]) == 0
        assert f"inside each KV group {plan.merged_heads}" in capsys.readouterr().err


def test_a_plan_without_a_merge_keeps_its_fingerprint():
    assert "head_merge" not in explicit_targets(PlanConfig(heads=4))
    assert explicit_targets(PlanConfig(heads=4, head_merge="paper"))["head_merge"] == "paper"


@pytest.mark.parametrize(
    ("name", "sizes", "how", "message"),
    [
        ("llama", {"ffn": 20}, "sum_output", "plan.head_merge=sum_output: expected fewer query heads in each KV group than the source's 4, found 4"),
        ("llama", {"kv_heads": 1}, "paper", "plan.head_merge=paper: expected fewer query heads"),
        ("llama", {"heads": 2}, "paper", "plan.head_merge=paper: expected at least half of the 4 query heads of each KV group, found 1"),
        ("gpt_oss", {"heads": 4}, "average_query", "has heads in model.layers.{layer}.self_attn.sinks, which is neither"),
        ("olmo2", {"heads": 4}, "sum_output", "has heads in model.layers.{layer}.self_attn.q_norm.weight, which is neither"),
        ("stablelm", {"heads": 4, "hidden": 16}, "paper", "family 'stablelm' has heads in model.layers.{layer}.self_attn.q_layernorm.norms.{head}.weight"),
        ("qwen3_next", {"heads": 4}, "sum_output", "has heads in model.layers.{layer}.self_attn.q_proj.weight, which is neither"),
        ("deepseek_v3", {"heads": 4}, "sum_output", "family 'deepseek_v3' has no query heads that share the keys of a KV group"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(name, sizes, how, message):
    family = families()[name]
    changes = {"qk_layernorm": True} if name == "stablelm" else family.proofs[0]
    model = architecture_of(tiny_config(family, changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        target_sizes(model, PlanConfig(**sizes, head_merge=how))
    assert target_sizes(model, PlanConfig(**sizes))


def test_an_unknown_merge_is_refused_before_anything_is_made(tmp_path, capsys):
    source = make_model(tmp_path / "m", "llama")
    words = [f"workspace={tmp_path / 'ws'}", f"source.model={source}", "score.importance=random"]
    line = refused(capsys, "prune", *words, "plan.heads=3", "plan.head_merge=mean")
    assert "plan.head_merge" in line and "average_query" in line
    line = refused(capsys, "prune", *words, "plan.ffn=20", "plan.head_merge=paper")
    assert "expected fewer query heads" in line
    assert not (tmp_path / "ws" / "plan").exists()


def test_a_plan_whose_heads_go_elsewhere_is_damaged(tmp_path):
    source = make_model(tmp_path / "m", "llama")
    words = [f"source.model={source}", "score.importance=magnitude", "plan.heads=3"]
    assert main(["plan", f"workspace={tmp_path}", *words, "plan.head_merge=sum_output"]) == 0
    folder, stored = tmp_path / "plan", load_file(tmp_path / "plan" / "keep.safetensors")
    (folder / "manifest.json").unlink()  # else its hash would tell
    gone = int((stored["heads.merged_into"][0] != torch.arange(6)).nonzero()[0])
    for wrong in (gone, (gone + 2) % 6, 99):
        into = stored["heads.merged_into"].clone()
        into[0, gone] = wrong
        save_file({**stored, "heads.merged_into": into}, folder / "keep.safetensors")
        with pytest.raises(
            ValueError, match=r"keep\.safetensors: damaged: heads\.merged_into: expected"
        ):
            read_plan(folder)
    save_file({HEADS: stored[HEADS]}, folder / "keep.safetensors")
    with pytest.raises(ValueError, match=r"heads\.merged_into: expected what plan\.json names"):
        read_plan(folder)


def test_the_families_whose_heads_can_be_merged_are_told_by_their_tables():
    assert set(families()) - set(MERGEABLE) == {
        "deepseek_v3", "gemma4_text", "gpt_oss", "minimax_m2", "olmo2", "olmo3", "olmoe", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next",
    }  # fmt: skip
    model = architecture_of(tiny_config(families()["llama"], {}))
    check_head_merge(model, model.sizes, "none")
