"""Several plans from one scoring, and the search for the best size within a budget, on the real engine."""

import json
import math
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import as_dict, from_dict, load_config
from nemo_minitron.workspace.artifacts import verify_tree
from nemo_minitron.workspace.command_log import commands_in
from nemo_minitron.workspace.manifest import read_manifest
from tests.support.models import predicting_model
from tests.support.runs import minitron, settings

QUICK = [
    "evaluate.speed=false",
    "evaluate.from_scratch=false",
    "evaluate.tasks=[]",
    "evaluate.prompts=0",
]


def words(workspace, teacher, corpus):
    return [
        word for word in settings(workspace, teacher, corpus) if not word.startswith("plan.")
    ] + QUICK


def made(folder):
    return read_manifest(folder).started


def test_variants_share_one_scoring_and_a_failed_one_costs_no_other(
    server, tmp_path, teacher, corpus, monkeypatch
):
    from nemo_minitron.flows.sweep import sweep

    workspace, variants = (
        tmp_path / "sweep",
        {"shallow": ["plan.layers=2"], "thin": ["plan.hidden=12", "plan.ffn=20"]},
    )
    overrides = words(workspace, teacher, corpus)
    # a folder of the user's own stands where the student of one variant belongs: that variant fails, late
    (workspace / "variants" / "shallow" / "student").mkdir(parents=True)
    (workspace / "variants" / "shallow" / "student" / "mine.txt").write_text("keep")
    with pytest.raises(
        RuntimeError,
        match=r"1 of 2 variants failed: shallow: ValueError: .*was not made by this package",
    ):
        sweep(variants, overrides=overrides, export_best=True)
    assert (workspace / "variants" / "shallow" / "student" / "mine.txt").read_text() == "keep"
    assert (workspace / "variants" / "thin" / "export" / "model.safetensors").is_file()
    (workspace / "variants" / "shallow" / "student" / "mine.txt").unlink()
    before = {
        name: made(workspace / name)
        for name in ("scores", "variants/thin/student", "variants/thin/pruned")
    }
    outcomes = sweep(variants, overrides=overrides)
    assert {name: made(workspace / name) for name in before} == before  # nothing was made twice
    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert outcomes[0].loss <= outcomes[1].loss
    assert (workspace / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert [row["name"] for row in json.loads((workspace / "sweep.json").read_text())] == [
        o.name for o in outcomes
    ]
    # both were cut in one pass over the teacher's weights
    assert made(workspace / "variants/thin/pruned") == made(workspace / "variants/shallow/pruned")
    assert verify_tree(workspace / "variants" / "thin")[1] == []
    with pytest.raises(
        RuntimeError, match=r"1 of 2 variants failed: wide: ValueError: plan.hidden"
    ):
        sweep({"thin": variants["thin"], "wide": ["plan.hidden=9999"]}, overrides=overrides)
    assert {name: made(workspace / name) for name in before} == before
    for wrong, text in (
        (
            {"x": ["score.importance=random"]},
            "variants: 'x' changes score, which all variants share",
        ),
        ({"../x": []}, "expected a name that can be a folder's"),
        ({}, "expected at least one name"),
    ):
        with pytest.raises(ValueError, match=text):
            sweep(wrong, overrides=overrides)


@pytest.mark.slow
def test_a_budget_is_met_by_the_size_that_learns_best(served, tmp_path, teacher, corpus):
    workspace = tmp_path / "search"
    budget = [
        "plan.budget.params=15000",
        "plan.budget.tolerance=0.1",
        "plan.budget.candidates=3",
        "plan.budget.steps=8",
    ]
    arguments = ["run", *words(workspace, teacher, corpus), *budget]
    done = minitron(*arguments, env=served)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((workspace / "search.json").read_text())
    assert len(found["candidates"]) == 3
    assert all(13500 <= row["parameters"] <= 16500 for row in found["candidates"].values())
    assert [(each["steps"], len(each["outcomes"])) for each in found["rounds"]] == [(4, 3), (8, 2)]
    last = found["rounds"][-1]["outcomes"]
    assert found["winner"] == last[0]["name"] and last[0]["loss"] <= last[1]["loss"]
    assert found["candidates"].keys() < found["screened"].keys()
    best = min(found["screened"], key=found["screened"].get)
    assert best in found["candidates"]
    predicted = [(row["of"], row["with"], row["candidates"]) for row in found["rank_correlation"]]
    assert predicted == [("screening", "4 steps", 3), ("4 steps", "8 steps", 2)]
    assert -1 <= found["rank_correlation"][0]["spearman"] <= 1
    plan = json.loads((workspace / "plan" / "plan.json").read_text())
    assert {axis: plan["after"][axis] for axis in found["sizes"]} == found["sizes"]
    page = (workspace / "report" / "report.html").read_text()
    assert "Sizes tried by the search" in page and "Rank correlation (Spearman)" in page
    assert (workspace / "export" / "minitron.json").is_file()
    for more, text in (
        (["plan.hidden=12"], "plan.hidden: either sizes or plan.budget.params, found both"),
        (["plan.budget.params=10"], "plan.budget"),
    ):
        done = minitron(*arguments, *more, env=served)
        assert done.returncode == 2 and text in done.stderr, done.stderr[-500:]
    done = minitron("plan", *arguments[1:])
    assert done.returncode == 2 and "which 'minitron run' makes" in done.stderr


def test_a_search_takes_the_nearest_where_it_screens_none_and_a_task_decides_where_it_is_named(
    server, tmp_path, teacher, corpus
):
    from nemo_minitron.flows.search import search

    workspace = tmp_path / "search"
    overrides = [
        *words(workspace, teacher, corpus), "plan.budget.params=15000", "plan.budget.tolerance=0.1",
        "plan.budget.candidates=2", "plan.budget.steps=2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"plan\.layer_choice=greedy: score removes one layer"):
        search(overrides=[*overrides, "plan.layer_choice=greedy"])
    assert not (workspace / "scores").exists()  # hours before it would have been noticed
    assert search(overrides=[*overrides, "plan.budget.screened=0"], compress_best=False) == []
    found = json.loads((workspace / "search.json").read_text())
    from nemo_minitron.pruning.size_search import candidates, default_choices

    model = open_checkpoint(teacher).architecture
    share = 15000 / sum(math.prod(shape) for _, _, shape in model.tensors())
    nearest = candidates(model, default_choices(model, share), 13500, 16500)[:2]
    assert [row["parameters"] for row in found["candidates"].values()] == [
        one.size.parameters for one in nearest
    ]
    assert found["screened"] == {} and not (workspace / "screen").exists()
    more = [
        "plan.budget.screened=4",
        "training.tasks=[held_out_choice]",  # which only the winner may stop by
        "+exp_manager.create_early_stopping_callback=true",
        "+exp_manager.early_stopping_callback_params={monitor: 'held_out_choice:acc', mode: max}",
        "plan.budget.metric=held_out_choice",
        "plan.budget.task_limit=8",
        "evaluate.task_limit=8",
    ]
    search(overrides=[*overrides, *more], compress_best=False)
    found = json.loads((workspace / "search.json").read_text())
    (only,) = found["rounds"]
    for name, judged in only["judged"].items():
        report = json.loads(
            (workspace / "rounds" / "2" / name / "report" / "report.json").read_text()
        )
        assert judged == -report["models"]["student"]["tasks"]["held_out_choice"]["acc"]
    assert list(only["judged"].values()) == sorted(only["judged"].values())


def test_the_winner_of_a_search_goes_on_from_its_rounds_as_if_it_had_never_stopped(
    server, tmp_path, teacher, corpus
):
    from nemo_minitron.cli.main import main
    from nemo_minitron.flows.search import search

    workspace = tmp_path / "search"
    overrides = [
        *words(workspace, teacher, corpus), "plan.budget.params=15000", "plan.budget.tolerance=0.1",
        "plan.budget.screened=0", "plan.budget.candidates=3", "plan.budget.steps=4", "plan.budget.continued=true",
    ]  # fmt: skip
    search(overrides=overrides)
    found = json.loads((workspace / "search.json").read_text())
    assert [(each["steps"], len(each["outcomes"])) for each in found["rounds"]] == [(2, 3), (4, 2)]
    for steps in (2, 4):
        student = workspace / "rounds" / str(steps) / found["winner"] / "student"
        assert json.loads((student / "stopped.json").read_text())["step"] == steps
        settings = json.loads((student / "manifest.json").read_text())["config"]
        assert settings["trainer"]["max_steps"] == 12
    alone = words(tmp_path / "alone", teacher, corpus)
    sizes = [f"plan.{axis}={size}" for axis, size in found["sizes"].items()]
    for stage in ("download", "score", "plan", "prune", "distill"):
        assert main([stage, *alone, *sizes]) == 0
    straight, ours = (
        load_file(place / "student" / "hf" / "model.safetensors")
        for place in (tmp_path / "alone", workspace)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in straight.items())
    lines = (workspace / "student" / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [line["step"] for line in log if "lr" in line] == list(range(1, 13))
    assert any("val_loss" in line and line["step"] == 2 for line in log)  # of the round


def test_the_winner_of_a_search_keeps_its_prediction_layers(
    server, tmp_path, tokenizer_folder, corpus
):
    from nemo_minitron.flows.search import search
    from nemo_minitron.pruning.plan_file import read_plan

    source, workspace = predicting_model(tmp_path, tokenizer_folder), tmp_path / "search"
    overrides = [
        *words(workspace, source, corpus), "plan.mtp=keep", "score.importance=magnitude", "trainer.max_steps=2",
        "plan.budget.params=52000", "plan.budget.tolerance=0.15", "plan.budget.screened=3",
        "plan.budget.candidates=2", "plan.budget.steps=2", "+plan.budget.choices.experts=[2,3]",
    ]  # fmt: skip
    search(overrides=overrides)
    plan = read_plan(workspace / "plan")
    assert plan.mtp_kept and plan.after["experts"] in (2, 3)
    export = open_checkpoint(workspace / "export")
    experts = [name for name in export.predictions if "down_proj" in name and ".experts." in name]
    assert len(experts) == plan.after["experts"]
    rounds = [read_plan(folder) for folder in (workspace / "rounds" / "2").glob("*/plan")]
    assert len(rounds) == 2 and all(each.mtp_kept for each in rounds)
    pruned = (workspace / "rounds" / "2").glob("*/pruned")
    assert not any(open_checkpoint(folder).predictions for folder in pruned)


def test_rounds_that_no_training_could_go_on_from_are_refused(tmp_path, teacher, corpus):
    from nemo_minitron.flows.forms import composed
    from nemo_minitron.flows.search import choose

    base = [
        *words(tmp_path, teacher, corpus),
        "plan.budget.params=15000",
        "plan.budget.continued=true",
    ]
    for more, key in (
        ("training.keep=best:loss", "training.keep=best:loss"),
        ("distill.teacher_logits=cache", "distill.teacher_logits=cache"),
        ("distill.live_teacher=elsewhere", "distill.live_teacher"),
        (
            "+exp_manager.create_early_stopping_callback=true",
            "exp_manager.create_early_stopping_callback=true",
        ),
    ):
        with pytest.raises(
            ValueError, match=f"plan.budget.continued: a training with {key} cannot"
        ):
            choose(composed("config", [*base, more]))


def test_a_candidate_of_a_search_merges_heads_only_where_it_loses_some(tmp_path, teacher, corpus):
    from nemo_minitron.cli.main import main
    from nemo_minitron.flows.cascade import _cut_to as cut_step
    from nemo_minitron.flows.forms import composed
    from nemo_minitron.flows.search import _short
    from nemo_minitron.stages.screen import nearest

    overrides = words(tmp_path, teacher, corpus)
    assert main(["download", *overrides]) == 0
    base = composed(
        "config", [*overrides, "plan.head_merge=sum_output", "plan.budget.params=15000"]
    )
    for sizes, how in (
        ({"heads": 3, "ffn": 20}, "sum_output"),
        ({"heads": 6, "ffn": 20}, "none"),
        ({"kv_heads": 2, "heads": 4}, "none"),
        ({"kv_heads": 2, "heads": 2}, "sum_output"),
    ):
        assert _short(base, "one", sizes, 2).plan.head_merge == how
    for size, how in (({"heads": 3}, "sum_output"), ({"ffn": 20}, "none")):
        step = composed("config", [*overrides, "plan.head_merge=sum_output"])
        cut_step(step, size)
        assert step.plan.head_merge == how
    base.plan.head_merge = "paper"
    with pytest.raises(ValueError, match=r"plan\.head_merge=paper: expected none, sum_output"):
        nearest(base)


def test_a_checkpoint_is_measured_against_the_teacher_that_its_lineage_names(
    server, finished, tmp_path, corpus
):
    from nemo_minitron.flows.evaluate_checkpoint import evaluate_checkpoint

    export = finished[0] / "export"
    small = [*QUICK, "data.validation.sequence_length=16", "data.validation.samples=8"]
    call = {"checkpoint": str(export), "workspace": str(tmp_path / "night"), "data": [str(corpus)]}
    results = evaluate_checkpoint(**call, overrides=small)
    assert [result.stage for result in results] == ["download", "evaluate"] and results[1].made
    assert [result.made for result in evaluate_checkpoint(**call, overrides=small)] == [
        False,
        False,
    ]
    told = commands_in(tmp_path / "night")[:2]
    assert [line.split()[:2] for line in told] == [
        ["minitron", "download"],
        ["minitron", "evaluate"],
    ]
    for line in told:  # and it does the same
        done = minitron(*shlex.split(line)[1:])
        assert done.returncode == 0 and "already done" in done.stdout + done.stderr
    with pytest.raises(RuntimeError, match="the quality gate failed"):
        evaluate_checkpoint(**call, overrides=[*small, "evaluate.min_retention=50"])
    own = shutil.copytree(export, tmp_path / "own")
    lineage = json.loads((own / "minitron.json").read_text())
    lineage["stages"][0]["inputs"][0] |= {
        "path": "pretrain/hf",
        "finished": "2026-01-01T00:00:00+00:00",
    }
    (own / "minitron.json").write_text(json.dumps(lineage))
    with pytest.raises(ValueError, match="was made from a model of its own run; give its folder"):
        evaluate_checkpoint(**{**call, "checkpoint": str(own)}, overrides=small)
    with pytest.raises(ValueError, match=r"has no minitron\.json that names one"):
        evaluate_checkpoint(**{**call, "checkpoint": str(finished[0] / "pruned")}, overrides=small)
    (own / "minitron.json").write_text('{"stages": [{"kind": "teacher", "inputs": 5}]}')
    with pytest.raises(ValueError, match=r"minitron\.json: damaged: stages\[0\]"):
        evaluate_checkpoint(**{**call, "checkpoint": str(own)}, overrides=small)


def test_a_variant_has_the_baseline_that_its_report_asks_for(
    tmp_path, teacher, corpus, monkeypatch
):
    from nemo_minitron.flows import sweep

    ran = []
    monkeypatch.setattr(sweep, "run_stages", lambda names, config: ran.append(names))
    for more in ([], ["evaluate.from_scratch=true"], ["distill.teacher_logits=cache"]):
        config = load_config("config", [*words(tmp_path / "v", teacher, corpus), *more])
        sweep.run_variant.fn(as_dict(config))
    assert ran == [
        ["distill", "evaluate"],
        ["distill", "baseline", "evaluate"],
        ["logits", "distill", "evaluate"],
    ]


def rates(optim, steps):
    """The learning rate of every step, as NeMo's own schedule gives it."""
    from nemo.core.optim.lr_scheduler import prepare_lr_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = prepare_lr_scheduler(optimizer, {"max_steps": steps, **optim["sched"]})["scheduler"]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    "sched",
    [
        ["constant_steps=500"],
        ["name=WarmupHoldAnnealLinear", "hold_steps=1500"],
        ["max_steps=4000"],
    ],
)
def test_a_round_has_the_whole_schedule_in_its_few_steps(sched):
    from nemo_minitron.flows.search import _short

    whole = load_config(
        "config",
        [
            "trainer.max_steps=2000",
            "optim.sched.min_lr=0.1",
            *(f"++optim.sched.{word}" for word in sched),
        ],
    )
    before = rates(whole.optim, 2000)
    short = _short(whole, "one", {"hidden": 3072}, 200)
    assert short.trainer["max_steps"] == 200 and short.optim["sched"]["warmup_steps"] == 40
    after = rates(short.optim, 200)
    # behind the warm-up, of 40 steps in both, the same rates at the same parts of the way
    parts = [step / 160 for step in range(160)]
    there = [before[40 + round(part * 1960)] for part in parts]
    assert after[40:] == pytest.approx(there, abs=0.02)
    # and the shortest round that there can be has one, too
    assert len(rates(_short(whole, "one", {"hidden": 3072}, 1).optim, 1)) == 1


def test_a_round_knows_the_length_of_a_training_that_its_launch_divides():
    from nemo_minitron.flows.search import _short

    words = [
        "training.max_tokens=32000", "data.train.sequence_length=100", "distill.batch_size=2", "optim.sched.warmup_steps=0",
        "++optim.sched.constant_steps=20", "launch.processes=4", "launch.slurm.nodes=2",
    ]  # fmt: skip
    for more, whole in (
        ([], 160),
        (["launch.kind=torchrun"], 40),
        (["launch.kind=slurm"], 20),
        (["launch.kind=slurm", "launch.stages=[score]"], 160),
        (["launch.kind=torchrun", "training.tensor_parallel=2", "training.parallel=shard"], 80),
    ):
        short = _short(load_config("config", [*words, *more]), "one", {"hidden": 3072}, 10)
        assert short.optim["sched"]["constant_steps"] == 10 * 20 // whole
        assert short.training.max_tokens is None


def test_a_round_of_a_search_stops_early_for_nobody():
    """Each candidate gets as many steps; and a round measures no task that it could stop by."""
    from nemo_minitron.flows.search import _short

    stops = [
        "training.tasks=[arc_easy]", "+exp_manager.create_early_stopping_callback=true",
        "+exp_manager.early_stopping_callback_params={monitor: 'arc_easy:acc', mode: max}",
    ]  # fmt: skip
    config = load_config("config", stops)
    short = from_dict(as_dict(_short(config, "one", {"hidden": 3072}, 200)))
    assert not short.exp_manager["create_early_stopping_callback"] and short.training.tasks == []
    assert config.exp_manager["create_early_stopping_callback"]  # the winner may stop
    plain = load_config("config", [])
    assert _short(plain, "one", {"hidden": 3072}, 200).exp_manager == plain.exp_manager
