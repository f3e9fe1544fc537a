"""plan.mtp=keep: prediction layers (MTP) go from the source to the export, cut along; training knows none."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import SINGLE, open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.proofs.prediction_proof import (
    drafted,
    drafts_truly,
    runs_predictions,
)
from nemo_minitron.pruning.plan_file import cut_of, mtp_note, read_plan
from nemo_minitron.pruning.slice_predictions import CutPredictions
from nemo_minitron.release.model_card import card_text
from nemo_minitron.scoring.magnitude import magnitudes
from nemo_minitron.stages.inputs import read_source
from nemo_minitron.stages.screen import nearest
from nemo_minitron.workspace.layout import Workspace
from tests.support.models import predicting_model
from tests.support.runs import refused, settings

STAGES = ("download", "score", "plan", "prune", "distill", "evaluate", "export")


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_folder):
    return predicting_model(tmp_path_factory.mktemp("predicting"), tokenizer_folder)


@pytest.fixture(scope="module")
def words(source, corpus):
    own = [
        "plan.mtp=keep", "plan.hidden=16", "plan.heads=null", "plan.ffn=null", "plan.expert_ffn=8",
        "plan.experts=3", "plan.layers=3", "score.importance=magnitude", "trainer.max_steps=2",
        "score.depth=none", "plan.drop_layers=[3]", "evaluate.from_scratch=false", "evaluate.tasks=[]",
    ]  # fmt: skip
    given = [each for each in own if not each.startswith(("plan.layers",))]
    return lambda place: [
        *(w for w in settings(place, source, corpus) if not w.startswith("plan.layers")), *given,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory, words):
    place = tmp_path_factory.mktemp("run") / "run"
    for stage in STAGES:
        assert main([stage, *words(place)]) == 0, stage
    return place


def test_the_export_has_them_cut_along_and_they_draft(done, source):
    export = open_checkpoint(done / "export")
    assert export.architecture.sizes["layers"] == 3
    assert {name.split(".")[2] for name in export.predictions} == {"3"}
    assert json.loads((done / "export/config.json").read_text())["num_nextn_predict_layers"] == 1
    before, after = load_file(source / SINGLE), load_file(done / "export" / SINGLE)
    hidden = load_file(done / "plan" / "keep.safetensors")["hidden"]
    old, new = "model.layers.4.", "model.layers.3."
    both = torch.cat([hidden, 32 + hidden])
    want = before[f"{old}eh_proj.weight"][hidden][:, both]
    assert torch.equal(after[f"{new}eh_proj.weight"], want)
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        assert torch.equal(after[new + name], before[old + name][hidden])
    gate = before[f"{old}mlp.gate.weight"][:, hidden]
    kept = [
        next(e for e in range(4) if torch.equal(gate[e], row))
        for row in after[f"{new}mlp.gate.weight"]
    ]
    assert kept == sorted(kept) and len(kept) == 3
    whole = before[f"{old}mlp.experts.{kept[1]}.down_proj.weight"][hidden]
    columns = {tuple(column) for column in whole.T.tolist()}
    found = after[f"{new}mlp.experts.1.down_proj.weight"].T.tolist()
    assert len(found) == 8 and {tuple(column) for column in found} <= columns
    if runs_predictions():
        assert drafted(done / "export").isfinite().all()
        assert drafts_truly(done / "export")


def test_neither_the_student_nor_its_parents_have_them(done):
    for folder in ("pruned", "student/hf"):
        assert not open_checkpoint(done / folder).predictions
        assert (
            json.loads((done / folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
        )


def test_the_card_and_the_plan_tell(done):
    said = "are cut along by their own weights"
    assert said in json.loads((done / "plan/plan.json").read_text())["mtp"]
    assert said in (done / "export/README.md").read_text().replace("\n", " ")


def test_the_card_tells_of_those_that_are_left_out(done, source):
    note = mtp_note(open_checkpoint(source))
    assert note.endswith("are left out (plan.mtp=drop)")
    plan = replace(read_plan(done / "plan"), mtp=note, mtp_kept=False)
    card = card_text(
        "m",
        asdict(read_source(Workspace(done))),
        plan,
        read_report(done / "report"),
    )
    assert "are left out (plan.mtp=drop)" in card.replace("\\", "") and "cut along by" not in card


def test_what_no_row_describes_is_refused_by_name(source, words, tmp_path, capsys):
    odd = shutil.copytree(source, tmp_path / "odd")
    tensors = load_file(odd / SINGLE)
    name = "model.layers.4.eh_proj.weight"
    for changed, said in (
        ({"model.layers.4.more.weight": torch.zeros(3)}, "model.layers.4.more.weight is in no row"),
        (
            {name: torch.zeros(32, 63)},
            f"{name}: config.json implies shape [32, 64], the file holds [32, 63]",
        ),
        ({name: None}, f"{name} is missing"),
    ):
        every = {n: t for n, t in {**tensors, **changed}.items() if t is not None}
        save_file(every, odd / SINGLE, {"format": "pt"})
        place = tmp_path / "run"
        shutil.rmtree(place, ignore_errors=True)
        arguments = [f"workspace={place}", f"source.model={odd}", "plan.drop_layers=[3]"]
        assert main(["plan", *arguments, "plan.mtp=keep"]) == 2
        told = capsys.readouterr().err
        assert "plan.mtp=keep" in told and "cannot be cut along" in told and said in told
        assert main(["plan", *arguments]) == 0


def test_a_cascade_cuts_them_along_in_every_step(done, words, tmp_path, capsys):
    """The export that a step makes is the next one's source."""
    from nemo_minitron.flows.cascade import _step, check

    sizes = "cascade.sizes=[{ffn:24},{ffn:16}]"
    base = load_config("config", [f"workspace={tmp_path}", sizes, "plan.mtp=keep"])
    check(base)
    assert _step(base, "2", done / "export", tmp_path, last=True).plan.mtp == "keep"
    own = [f"source.model={done / 'export'}", "plan.drop_layers=null", "plan.experts=2"]
    assert main(["prune", *words(tmp_path / "run"), *own]) == 0
    plan = read_plan(tmp_path / "run" / "plan")
    assert plan.mtp_kept and plan.before["experts"] == 3
    source = open_checkpoint(done / "export")
    behind = CutPredictions(source, cut_of(plan, source.architecture), magnitudes)
    assert {name.split(".")[2] for name in behind.entries} == {"3"}
    assert sum("experts" in name and "down_proj" in name for name in behind.entries) == 3


def test_what_no_search_could_keep_is_refused_before_anything_is_screened(
    source, corpus, tmp_path, capsys
):
    odd = shutil.copytree(source, tmp_path / "odd")
    tensors = load_file(odd / SINGLE) | {"model.layers.4.more.weight": torch.zeros(3)}
    save_file(tensors, odd / SINGLE, {"format": "pt"})
    given = [w for w in settings(tmp_path / "run", odd, corpus) if not w.startswith("plan.")]
    given += ["score.importance=magnitude", "plan.mtp=keep", "plan.budget.params=20000"]
    assert main(["score", *given]) == 0
    capsys.readouterr()
    told = refused(capsys, "screen", *given)
    assert "plan.mtp=keep" in told and "model.layers.4.more.weight is in no row" in told
    with pytest.raises(ValueError, match=r"plan\.mtp=keep: .* cannot be cut along"):
        nearest(load_config("config", [*given, "plan.budget.screened=0"]))
