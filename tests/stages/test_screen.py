"""Screening, layer times and sensitivity as stages: what they find, go on with, and refuse."""

import json
import shutil
from pathlib import Path

import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.data.mixtures import validation_samples
from nemo_minitron.evaluation.cut_losses import read_sensitivity
from nemo_minitron.evaluation.held_out_loss import held_out_loss
from nemo_minitron.evaluation.screening import read_screen
from nemo_minitron.models.causal_lm import load_model, load_tokenizer
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.layer_times import FILE, latency_of, read_layer_times
from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.pruning.size_search import candidates, default_choices
from nemo_minitron.stages.screen import nearest
from tests.support.models import make_model
from tests.support.processes import until
from tests.support.runs import kill_group, refused, started
from tests.support.two_ranks import on_two_ranks

SMALL = [
    "data.calibration.sequence_length=16", "data.calibration.samples=20", "data.validation.sequence_length=16",
    "data.validation.samples=16", "data.train.sequence_length=16", "data.holdout=0.2",
]  # fmt: skip
BUDGET = [
    "plan.budget.params=15000",
    "plan.budget.tolerance=0.15",
    "plan.budget.screened=12",
    "plan.budget.candidates=3",
]


@pytest.fixture(scope="module")
def scored(once, teacher, corpus):
    """A workspace with scores of all axes, and the words that made it."""
    words = [f"source.model={teacher}", f"data.train.paths=['{corpus}']", *SMALL]
    place = once(
        "screened", lambda folder: main(["score", f"workspace={folder / 'run'}", *words]) and None
    )
    return place / "run", words


@pytest.fixture
def place(scored, tmp_path):
    shutil.copytree(scored[0], tmp_path / "run", symlinks=True)
    return tmp_path / "run", [f"workspace={tmp_path / 'run'}", *scored[1]]


def facts(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["facts"]


def test_what_is_screened_keeps_the_budget_and_is_what_the_pruned_checkpoint_is(place, capsys):
    workspace, words = place
    found = facts(capsys, "screen", *words, *BUDGET)
    screen = read_screen(workspace / "screen")
    assert (
        found["sizes_possible"]
        == screen.sizes_possible
        >= screen.sizes_within
        >= len(screen.candidates)
    )
    losses = [one.loss for one in screen.candidates]
    assert (
        losses == sorted(losses) and len({one.name for one in screen.candidates}) == len(losses) > 3
    )
    assert len(screen.chosen) == 3 and screen.chosen[0] == 0
    for one in screen.candidates:
        assert 12750 <= one.costs["parameters"] <= 17250
        assert len(one.layers) == one.sizes["layers"]
    for number in (0, len(losses) - 1):
        one = screen.candidates[number]
        sizes = [f"plan.{axis}={size}" for axis, size in one.sizes.items()]
        assert main(["prune", *words, *sizes]) == 0
        pruned = open_checkpoint(workspace / "pruned")
        assert model_size(pruned.architecture).parameters == one.costs["parameters"]
        assert (
            json.loads((workspace / "plan" / "plan.json").read_text())["layers_kept"] == one.layers
        )
        samples_NS = validation_samples(
            load_config("config", words), load_tokenizer(workspace / "pruned")
        )
        loss = held_out_loss(load_model(workspace / "pruned"), pruned.family, samples_NS, 8)
        assert one.loss == pytest.approx(loss, rel=1e-5)


def test_candidates_are_measured_with_their_heads_merged(place, capsys):
    workspace, words = place
    choices = ["+plan.budget.choices.heads=[3,6]", "+plan.budget.choices.ffn=[12,24]"]
    asked = ["plan.budget.parameters=22500", *choices]
    plain = facts(capsys, "screen", *words, *asked)["candidates"]
    screened = (workspace / "screen" / "manifest.json").read_text()
    assert not {"continued", "head_merge"} & json.loads(screened)["config"].keys()
    facts(capsys, "screen", *words, *asked, "plan.head_merge=none")
    assert (workspace / "screen" / "manifest.json").read_text() == screened  # nothing asked anew
    merge = "plan.head_merge=average_query"
    merged = facts(capsys, "screen", *words, *asked, merge)["candidates"]
    losses = [
        {one["sizes"]["heads"]: one["loss"] for one in found if one["sizes"]["ffn"] == 12}
        for found in (plain, merged)
    ]
    assert losses[0][6] == losses[1][6]  # no head goes
    assert losses[0][3] != losses[1][3]
    assert main(["prune", *words, "plan.heads=3", "plan.ffn=12", merge]) == 0
    pruned = open_checkpoint(workspace / "pruned")
    samples_NS = validation_samples(load_config("config", words), load_tokenizer(pruned.folder))
    loss = held_out_loss(load_model(pruned.folder), pruned.family, samples_NS, 8)
    assert losses[1][3] == pytest.approx(loss, rel=1e-5)
    for command in (["screen", *words, *asked], ["sensitivity", *words]):
        capsys.readouterr()
        said = refused(capsys, *command, "plan.head_merge=paper")
        assert "plan.head_merge=paper: expected none, sum_output or average_query" in said


def test_a_killed_screening_goes_on_and_measures_nothing_twice(place):
    workspace, words = place
    # a few tenths of a second each
    asked = [
        "plan.budget.screened=20", "plan.budget.screen_samples=64", "data.validation.samples=64",
        "data.validation.sequence_length=48", "evaluate.batch_size=1",
    ]  # fmt: skip

    def results():
        return {path: path.stat().st_mtime_ns for path in (workspace / "results").glob("*.json")}

    process = started("screen", *words, *BUDGET, *asked)
    until(lambda: len(results()) >= 2 or process.poll() is not None, every=0.02)
    kill_group(process)
    before = results()
    assert len(before) >= 2
    assert not (workspace / "screen").exists()
    assert started("screen", *words, *BUDGET, *asked).wait() == 0
    after = results()
    assert {path: after[path] for path in before} == before
    screen = read_screen(workspace / "screen")
    assert len(after) == len(screen.candidates) > len(before)


def test_two_ranks_find_what_one_does(place):
    workspace, words = place
    assert main(["screen", *words, *BUDGET]) == 0
    alone = (workspace / "screen" / "screen.json").read_text()
    shutil.rmtree(workspace / "screen")
    shutil.rmtree(workspace / "results")
    assert on_two_ranks("screen", *words, *BUDGET, "evaluate.device=cpu").returncode == 0
    assert json.loads((workspace / "screen" / "screen.json").read_text()) == json.loads(alone)


def test_a_task_decides_where_it_is_named(place, capsys):
    _, words = place
    metric = "plan.budget.metric=held_out_choice:acc"
    few = ["plan.budget.task_limit=12", "plan.budget.screened=4"]
    found = facts(capsys, "screen", *words, *BUDGET, metric, *few)
    accuracy = [one["tasks"]["held_out_choice"]["acc"] for one in found["candidates"]]
    assert accuracy == sorted(accuracy, reverse=True)
    assert [one["judged"] for one in found["candidates"]] == [-value for value in accuracy]
    wrong = "plan.budget.metric=held_out_choice:f1"
    assert main(["screen", *words, *BUDGET, *few, wrong]) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # behind lm-eval's progress
    assert "plan.budget.metric: held_out_choice has no metric 'f1'; it has acc" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "plan.budget: expected how large the model may be"),
        (["plan.budget.params=15000", "plan.hidden=12"], "plan.hidden: either sizes or plan.budget.params, found both"),
        (["plan.budget.params=15000", "+plan.budget.choices.vocab=[128]"], "plan.budget.choices.vocab: screening reads with the whole vocabulary"),
        (["plan.budget.memory_bytes=1e9"], "the model as it is keeps every bound, and nothing has to be cut"),
        (["plan.budget.params=15000", "plan.budget.weight_bytes=20000"], "mean weight_bytes of 28,500 or more"),
        (["plan.budget.memory_bytes=10", "plan.budget.context=8"], "nearest: memory_bytes"),
        (["plan.budget.params=15000", "+plan.budget.choices.hidden=[13]"], "the last: llama needs"),
        (["plan.budget.params=15000", "+plan.budget.choices.hidden=[99]"], "hidden: expected whole numbers of 1 to 24"),
        (["plan.budget.speedup=2"], "measure-layers"),
        (["plan.budget.speedup=0.5"], "plan.budget.speedup: "),
        (["plan.budget.latency_ms=1", "plan.budget.layer_times=nowhere.json"], "no such file: nowhere.json"),
        (["plan.budget.params=15000", "plan.layer_choice=greedy"], "plan.layer_choice=greedy: score removes one layer"),
        (["plan.budget.params=15000", "plan.layer_choice=contiguous"], "blocks of 2 layers, which the scores did not measure by block_influence; set score.blocks=[2]"),
        (["plan.budget.params=15000", "plan.layer_choice=contiguous", "+plan.budget.choices.layers=[1,9]"], "layers: expected whole numbers of 1 to 3"),
    ],
)  # fmt: skip
def test_a_budget_that_nothing_meets_is_one_line(scored, capsys, more, said):
    place, words = scored
    assert said in refused(capsys, "screen", f"workspace={place}", *words, *more)


def test_a_search_loses_no_depth_whichever_layers_go(place, capsys):
    workspace, words = place
    asked = [*BUDGET, "plan.layer_choice=contiguous", "score.blocks=[2]"]
    depths = "+plan.budget.choices.layers=[1,2,3]"
    widths = ["+plan.budget.choices.ffn=[8,16,24]", "+plan.budget.choices.hidden=[18,24]"]
    few = ["plan.budget.params=12000", "plan.budget.tolerance=0.5"]
    assert main(["score", *words, *asked]) == 0
    capsys.readouterr()
    facts(capsys, "screen", *words, *asked, *few, depths, *widths)
    found = {len(one.layers): one.layers for one in read_screen(workspace / "screen").candidates}
    assert set(found) == {1, 2, 3}
    assert main(["plan", *words, "plan.layers=1", *asked[-2:]]) == 0
    plan = json.loads((workspace / "plan" / "plan.json").read_text())
    assert plan["layers_kept"] == found[1]  # one block has gone
    # widths alone lose nothing, whatever the choice
    capsys.readouterr()
    facts(capsys, "screen", *words, *few, *widths, "plan.layer_choice=greedy")
    # a ranking without a pass has no blocks, and one without a depth has no layers to lose
    assert main(["score", *words, "score.importance=magnitude"]) == 0
    capsys.readouterr()
    more = [*words, *BUDGET, "plan.layer_choice=contiguous", "score.importance=magnitude"]
    assert "score.importance=magnitude measures no blocks" in refused(capsys, "screen", *more)
    assert main(["score", *words, "score.depth=none"]) == 0
    capsys.readouterr()
    facts(capsys, "screen", *words, *BUDGET, "score.depth=none")
    assert {len(one.layers) for one in read_screen(workspace / "screen").candidates} == {3}
    assert "the scores rank no layers" in refused(
        capsys, "screen", *words, *BUDGET, depths, "score.depth=none"
    )


NEAREST = ["plan.budget.screened=0", "plan.budget.params=15000", "plan.budget.tolerance=0.15"]


@pytest.mark.parametrize("grid", [None, {"vocab": [260, 280, 300], "hidden": [12, 18]}])
def test_the_nearest_to_a_target_alone_are_those_that_a_search_one_by_one_finds(scored, grid):
    place, words = scored
    chosen = [f"+plan.budget.choices.{axis}={sizes}" for axis, sizes in (grid or {}).items()]
    config = load_config("config", [f"workspace={place}", *words, *NEAREST, *chosen])
    model = open_checkpoint(Path(config.source.model)).architecture
    grid = grid or default_choices(model, 15000 / model_size(model).parameters)
    expected = [
        (list(one.sizes.items()), one.size.parameters)
        for one in candidates(model, grid, 12750, 17250)
    ]
    assert len(expected) > 2
    assert [(list(sizes.items()), count) for sizes, count in nearest(config)] == expected


def test_the_nearest_to_a_target_keep_every_other_bound(place, capsys):
    workspace, words = place
    asked = ["plan.budget.dtype=float32", "plan.budget.context=32", "plan.budget.batch=2"]
    grid = {"hidden": [12, 18, 24], "ffn": [16, 24, 40], "heads": [3, 6], "layers": [2, 3]}
    asked += [f"+plan.budget.choices.{axis}={sizes}" for axis, sizes in grid.items()]
    assert main(["measure-layers", *words, *asked]) == 0

    def found(*more):
        return nearest(load_config("config", [*words, *asked, *NEAREST, *more]))

    times = read_layer_times(workspace / "layer_times" / FILE)
    model = open_checkpoint(Path(load_config("config", words).source.model)).architecture

    def latency(sizes):
        complete = complete_targets(model.family, model.sizes, sizes)
        return latency_of(times, model)(range(complete["layers"]), complete)

    free = found()
    took = sorted({float(latency(sizes)) for sizes, _ in free})
    bound = sum(took[len(took) // 2 - 1 :][:2]) / 2  # no size's own time
    quick, small = [f"plan.budget.latency_ms={bound!r}"], ["plan.budget.memory_bytes=64000"]
    assert found(*quick) == [one for one in free if latency(one[0]) <= bound] != free
    fitting = found(*small)
    assert 0 < len(fitting) < len(free) and fitting == [one for one in free if one in fitting]
    cached = (
        2 * 32 * 2 * 3 * 4 * 2
    )  # bytes of a layer: keys and values of three heads of four numbers
    assert all(4 * count + cached * sizes["layers"] <= 64000 for sizes, count in fitting)
    took = sorted({float(latency(sizes)) for sizes, _ in fitting})
    bound = sum(took[:2]) / 2 if len(took) > 1 else 1.01 * took[0]  # that some of them keep
    quick = [f"plan.budget.latency_ms={bound!r}"]
    assert found(*quick, *small) == [one for one in fitting if latency(one[0]) <= bound]
    # a cache of one byte is counted so, and at its context
    cache = ["plan.budget.measure=kv_bytes_per_token", "plan.budget.params=48"]
    cache.append("+plan.budget.choices.kv_heads=[1,2,3]")
    byte = found(*cache, "plan.budget.cache_dtype=float8")
    assert {2 * 4 * sizes["kv_heads"] * sizes["layers"] for sizes, _ in byte} == {48}
    said = "mean memory_bytes of 51,000 or more, and plan.budget.memory_bytes allows 50,000"
    with pytest.raises(ValueError, match=said):
        found("plan.budget.memory_bytes=50000")


def test_the_nearest_are_counted_with_the_layers_that_the_plan_keeps(
    tmp_path, corpus, capsys, tokenizer_folder
):
    import torch
    import transformers

    folder = make_model(
        tmp_path / "unlike", "deepseek_v3", vocab_size=300, num_key_value_heads=6, head_dim=4, first_k_dense_replace=1,
        kv_lora_rank=12, q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6, n_group=1,
        topk_group=1, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # the dense layer does nothing, and goes first
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, folder)
    place = tmp_path / "run"
    words = [
        f"workspace={place}",
        f"source.model={folder}",
        f"data.train.paths=['{corpus}']",
        *SMALL,
    ]
    assert main(["score", *words]) == 0
    whole = model_size(open_checkpoint(folder).architecture).parameters
    budget = [
        f"plan.budget.params={0.87 * whole}",
        "plan.budget.tolerance=0.05",
        "plan.budget.screened=0",
    ]
    asked = [*words, *budget, "+plan.budget.choices.layers=[2]"]
    ((sizes, count),) = nearest(load_config("config", asked))
    assert sizes == {"layers": 2}
    assert main(["prune", *words, "plan.layers=2"]) == 0
    plan = json.loads((place / "plan" / "plan.json").read_text())
    assert plan["layers_kept"] == [1, 2] and plan["cost_after"]["parameters"] == count
    capsys.readouterr()
    assert main(["size", str(place / "pruned"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == count
    assert main(["size", str(folder), "layers=2"]) == 0
    assert "note: layers=2: the first are counted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["plan.budget.parameters=15000"], "plan.budget.params: expected how large the model may be"),
        (["plan.budget.params=15000", "plan.hidden=12"], "plan.hidden: either sizes or plan.budget.params"),
        (
            ["plan.budget.params=15000", "plan.budget.speedup=2", "+plan.budget.choices.vocab=[200]"],
            "plan.budget.speedup: the table of layer times does not say what another vocab saves",
        ),
        (
            ["plan.budget.params=15000", "plan.budget.latency_ms=2", "+plan.budget.choices.vocab=[200]"],
            "plan.budget.latency_ms: the table of layer times does not say what another vocab saves",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_nearest_is_refused_before_anything_is_measured(tmp_path, more, said):
    from nemo_minitron.flows.search import choose

    words = [f"workspace={tmp_path / 'run'}", "plan.budget.screened=0", *more]
    with pytest.raises(ValueError) as refusal:
        choose(load_config("config", words))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_bounds_of_memory_and_time_are_kept_by_a_table_measured_here(place, capsys):
    workspace, words = place
    asked = ["plan.budget.dtype=float32", "plan.budget.context=32", "plan.budget.batch=2"]
    told = facts(capsys, "measure-layers", *words, *asked)
    times = read_layer_times(workspace / "layer_times" / FILE)
    assert told["machine"] == times.machine and "threads" in times.machine
    assert times.kind_of == [0, 0, 0] and max(times.kinds[0].ms) > 0
    assert {"hidden", "ffn", "heads"} <= set(times.kinds[0].axes)
    bounds = [
        "plan.budget.speedup=1.3",
        "plan.budget.memory_bytes=120000",
        "plan.budget.screened=4",
    ]
    found = facts(capsys, "screen", *words, *asked, *bounds)
    assert found["machine"] == times.machine
    for one in found["candidates"]:
        costs = one["costs"]
        assert costs["latency_ms"] <= found["source"]["latency_ms"] / 1.3
        assert costs["memory_bytes"] <= 120000
        assert costs["memory_bytes"] == costs["weight_bytes"] + 2 * 32 * costs["kv_bytes_per_token"]
    # the table serves another workspace; another pass it does not
    table = workspace / "layer_times" / FILE
    other = [f"plan.budget.layer_times={table}", *bounds]
    shutil.copy(table, workspace.parent / "table.json")
    moved = [f"plan.budget.layer_times={workspace.parent / 'table.json'}", *bounds]
    shutil.rmtree(workspace / "layer_times")
    assert "no such file" in refused(capsys, "screen", *words, *asked, *other)
    assert main(["screen", *words, *asked, *moved]) == 0
    capsys.readouterr()
    said = refused(capsys, "screen", *words, *asked, *moved, "plan.budget.context=64")
    assert "its times are of context=32, and plan.budget.context is 64" in said


def test_sensitivity_says_what_is_cheap_to_cut(place, capsys):
    workspace, words = place
    assert main(["sensitivity", *words]) == 0
    out = capsys.readouterr().out
    assert "nats per 1 % saved" in out and "least missed layers" in out
    found = read_sensitivity(workspace / "sensitivity")
    assert {cut.axis for cut in found.axes} == {"hidden", "ffn", "heads", "kv_heads", "layers"}
    assert set(found.layers) == {"0", "1", "2"}
    for cut in found.axes:
        assert 0 < cut.share < 1 and 0 < cut.parameters < 1
    assert (
        (workspace / "sensitivity" / "plots" / "sensitivity.png")
        .read_bytes()
        .startswith(b"\x89PNG")
    )
    # a layer that is left out alone is the axis of layers cut by one, where it is the least important
    (one,) = [cut for cut in found.axes if cut.axis == "layers" and cut.size == 2][:1]
    assert one.loss in found.layers.values()
    assert main(["sensitivity", *words]) == 0 and "already done" in capsys.readouterr().out
