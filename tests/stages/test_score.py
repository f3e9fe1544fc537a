"""The score stage: parts of a whole, growth, resumption, ranks, rounds; the same numbers on every way."""

import json
import math
import re
import resource
import signal

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.families import families
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.plan_file import read_plan
from nemo_minitron.scoring.scores_file import read_scores
from nemo_minitron.stages.devices import device_of
from nemo_minitron.stages.score import recipe as recipe_of_scores
from nemo_minitron.workspace.manifest import read_manifest
from tests.support.models import make_model
from tests.support.processes import until
from tests.support.runs import minitron, refused, started
from tests.support.two_ranks import module_on_two_ranks, on_two_ranks, two_ranks


@pytest.fixture
def words(teacher, corpus):
    """A source and a little calibration text."""
    return [
        f"source.model={teacher}", f"data.calibration.paths=[{corpus}]", "data.calibration.samples=11",
        "data.calibration.sequence_length=16", "score.batch_size=2", "score.aggregation.also=[l2,var]",
    ]  # fmt: skip


def score(place, words, *more):
    assert main(["score", f"workspace={place}", *words, *more]) == 0
    return read_scores(place / "scores")


def same(found, expected, rtol=1e-6):
    """All sums and rankings, to rounding."""
    assert found.calibration.samples == expected.calibration.samples
    assert set(found.calibration.sums) == set(expected.calibration.sums)
    assert set(found.calibration.depth) == set(expected.calibration.depth)
    for key, sums in expected.calibration.sums.items():
        assert torch.allclose(found.calibration.sums[key].squares, sums.squares, rtol=rtol), key
    for key, sums in expected.calibration.depth.items():
        assert found.calibration.depth[key].count == sums.count
        assert torch.allclose(found.calibration.depth[key].total, sums.total, rtol=rtol), key
    for axis, ranking in expected.ranking.items():
        assert torch.allclose(found.ranking[axis], ranking, rtol=1e-4, atol=1e-7), axis
    return True


def test_parts_scored_apart_merge_to_the_whole(capsys, tmp_path, words):
    words = [*words, "score.depth=lm_loss", "score.blocks=[2]"]
    whole = score(tmp_path / "whole", words)
    assert len(whole.calibration.samples) == 11
    parts = []
    for part in ("1/3", "2/3", "3/3"):
        place = tmp_path / part[0]
        parts.append(set(score(place, words, f"score.shard={part}").calibration.samples))
    assert set.union(*parts) == set(range(11)) and sum(map(len, parts)) == 11
    merge = [f"workspace={tmp_path / 'sum'}", *words]
    capsys.readouterr()
    line = refused(capsys, "score", *merge, f"score.merge=[{tmp_path / '1'},{tmp_path / '3'}]")
    assert "the parts hold 7 of 11 samples; number 1 is the first that is missing" in line
    line = refused(capsys, "score", *merge, f"score.merge=[{tmp_path / '1'},{tmp_path / '1'}]")
    assert "share calibration sample 0" in line
    line = refused(
        capsys, "score", *merge, f"score.merge=[{tmp_path / '1'}]", "data.calibration.seed=1"
    )
    assert "not the samples" in line
    merged = score(
        tmp_path / "sum", words, f"score.merge=[{tmp_path / '3'},{tmp_path / '1'},{tmp_path / '2'}]"
    )
    assert same(merged, whole)
    capsys.readouterr()
    assert (
        main(["score", *merge, "--json"]) == 0
    )  # to a plain run it is the scoring that it asks for
    assert json.loads(capsys.readouterr().out)["made"] is False


def test_more_samples_add_to_what_is_there(capsys, tmp_path, words):
    small = score(tmp_path / "grown", words, "data.calibration.samples=7")
    capsys.readouterr()
    assert main(["score", f"workspace={tmp_path / 'grown'}", *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["notes"] == ["7 of 11 samples were scored before"]
    assert f"{4 * 16} tokens in" in result["headline"]
    grown = read_scores(tmp_path / "grown" / "scores")
    assert same(grown, score(tmp_path / "whole", words))
    assert grown.calibration.samples.items() > small.calibration.samples.items()
    capsys.readouterr()
    # another aggregation is another ranking of the same sums: nothing is run
    assert (
        main(
            [
                "score",
                f"workspace={tmp_path / 'grown'}",
                *words,
                "score.aggregation.sequence=l2",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["made"] and "tokens" not in result["headline"]
    assert not torch.allclose(
        read_scores(tmp_path / "grown" / "scores").ranking["ffn"], grown.ranking["ffn"]
    )
    # sums over too many samples cannot be taken back
    assert same(score(tmp_path / "grown", words, "data.calibration.samples=7"), small)


@pytest.mark.parametrize(("streaming", "mark"), [("off", "part-0"), ("on", "layers-0")])
def test_a_killed_scoring_goes_on_where_it_was(tmp_path, words, streaming, mark):
    slow = ["data.calibration.samples=300", "score.save_seconds=0", f"score.streaming={streaming}"]
    place = tmp_path / "killed"
    process = started("score", *words, *slow, f"workspace={place}")
    state = place / "scores" / "state"
    until(lambda: process.poll() is not None or (state / mark).exists(), every=0.005)
    assert process.poll() is None  # it has saved something, and is not done
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "scores" / "manifest.json").exists()
    done = minitron("score", f"workspace={place}", *words, *slow, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if streaming == "off":
        (note,) = result["notes"]
        assert 0 < int(re.match(r"(\d+) of 300 samples were scored before", note)[1]) < 300
    else:
        assert re.search("scoring resumes at layer [12]", done.stderr)
    assert not state.exists()
    assert same(read_scores(place / "scores"), score(tmp_path / "whole", words, *slow))
    assert main(["verify", str(place)]) == 0


@pytest.mark.parametrize("more", [(), ("score.parallel=shard",), ("score.streaming=on",)])
def test_two_ranks_give_what_one_gives(tmp_path, words, more):
    depth = ["score.depth=lm_loss", "plan.layers=1", "plan.layer_choice=greedy"]
    alone = score(tmp_path / "one", words, *depth)
    done = on_two_ranks("score", *words, *depth, *more, f"workspace={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("score: activation importance") == 1
    found = read_scores(tmp_path / "two" / "scores")
    assert same(found, alone)
    assert found.greedy == alone.greedy and len(found.greedy) == 2


def test_a_rank_without_samples_and_memory_that_is_left(tmp_path, words):
    from nemo_minitron.models import free_memory

    words = [*words, "data.calibration.samples=2", "score.batch_size=2", "score.streaming=on"]
    alone = score(tmp_path / "one", words)
    done = on_two_ranks("score", *words, f"workspace={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(read_scores(tmp_path / "two" / "scores"), alone)
    assert 10**8 < free_memory.available_bytes(torch.device("cpu")) < 2**62


def test_a_mistake_on_rank_0_ends_all_ranks(tmp_path, words):
    place = f"workspace={tmp_path / 'two'}"
    ranks = two_ranks("score", *words, "data.calibration.samples=999999", place)
    (_, first), (_, second) = (rank.communicate(timeout=120) for rank in ranks)
    assert all(rank.returncode for rank in ranks)
    assert "expected 999999 samples of 16 tokens" in first and "Traceback" not in second


def test_a_rank_that_fails_in_the_midst_of_a_pass_ends_and_none_halves_alone(tmp_path):
    """Memory that runs out in a sharded model's second pass, and a full disk on rank 0."""
    folder = make_model(tmp_path / "m", "llama")
    module_on_two_ranks("tests.support.failing_ranks", folder, tmp_path, seconds=90)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said == ["OSError", "RuntimeError"]


def test_what_all_ranks_refuse_in_a_pass_is_told(tmp_path, words, tokenizer_folder):
    source = tmp_path / "source"
    family = families()["falcon_h1"]
    tiny_model(family, {**family.proofs[0], "vocab_size": 300}, source)
    for path in tokenizer_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    words = [f"source.model={source}", *words[1:], "data.calibration.packing=documents"]
    ranks = two_ranks("score", *words, f"workspace={tmp_path / 'two'}")
    (_, first), _ = (rank.communicate(timeout=120) for rank in ranks)
    assert ranks[0].returncode == 2 and "Traceback" not in first, first[-3000:]
    assert (
        "in falcon_h1, as the installed transformers computes it, one document sees another"
        in first
    )


def test_ranks_leave_gpus_alone_where_the_stage_computes_on_the_cpu(tmp_path, words):
    place = f"workspace={tmp_path / 'two'}"
    module_on_two_ranks("tests.support.with_gpus", "score", *words, "score.device=cpu", place)
    assert read_scores(tmp_path / "two" / "scores").ranking


@pytest.mark.parametrize(
    ("stage", "word"),
    [
        ("score", "score.device=cpu"), ("screen", "evaluate.device=cpu"), ("sensitivity", "evaluate.device=cpu"),
        ("evaluate", "evaluate.device=cpu"), ("logits", "trainer.accelerator=cpu"),
        ("distill", "trainer.accelerator=cpu"), ("pretrain", "+pretrain.trainer.accelerator=cpu"),
        ("correct", "+correct.trainer.accelerator=cpu"),
    ],
)  # fmt: skip
def test_the_key_that_says_where_a_stage_computes(stage, word):
    assert device_of(stage, load_config("config", [])) == "auto"
    assert device_of(stage, load_config("config", [word])) == "cpu"


def faint(folder, tokenizer_folder, gains):
    """A model whose layers add to the hidden states as much as ever, times a gain each."""
    make_model(folder, "llama", 1, vocab_size=300, num_hidden_layers=len(gains))
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for layer, gain in enumerate(gains):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"] *= gain
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_layers_chosen_one_by_one_in_a_block_or_greedily(tmp_path, tokenizer_folder, corpus):
    """Layers 0 and 2 do nothing and layer 3 nearly nothing: the two least ones are apart, the block is not."""
    source = faint(tmp_path / "source", tokenizer_folder, (0, 1, 0, 0.01))
    words = [
        f"source.model={source}", f"data.calibration.paths=[{corpus}]", "data.calibration.samples=6",
        "data.calibration.sequence_length=16", "score.depth=lm_loss", "plan.layers=2",
    ]  # fmt: skip
    dropped = {}
    for choice in ("scattered", "contiguous", "greedy"):
        place = tmp_path / choice
        scores = score(place, words, f"plan.layer_choice={choice}")
        assert main(["plan", f"workspace={place}", *words, f"plan.layer_choice={choice}"]) == 0
        dropped[choice] = read_plan(place / "plan").layers_dropped
    importance = scores.ranking["layers"]
    assert importance[0] == importance[2] == 0 < abs(importance[3]) < abs(importance[1])
    assert dropped == {"scattered": (0, 2), "contiguous": (2, 3), "greedy": (0, 2)}
    assert scores.greedy == (2, 0)  # of two equal layers the later one


@pytest.mark.parametrize("choice", ["scattered", "contiguous", "greedy"])
def test_layers_whose_importance_is_no_number_are_not_the_least_important(
    capsys, tmp_path, tokenizer_folder, corpus, choice
):
    source = faint(tmp_path / "source", tokenizer_folder, (1, 1, math.nan, 1))
    words = [
        f"workspace={tmp_path / 'ws'}", f"source.model={source}", f"data.calibration.paths=[{corpus}]",
        "data.calibration.samples=6", "data.calibration.sequence_length=16", "score.depth=lm_loss", "plan.layers=2",
        f"plan.layer_choice={choice}",
    ]  # fmt: skip
    if choice != "greedy":
        assert main(["score", *words]) == 0
    capsys.readouterr()
    stage = "score" if choice == "greedy" else "plan"
    assert "importance scores contain NaN or infinity" in refused(capsys, stage, *words)


def test_a_choice_that_was_not_measured_says_what_to_run(capsys, tmp_path, words):
    place = tmp_path / "ws"
    score(place, words)
    capsys.readouterr()
    plan = ["plan", f"workspace={place}", *words, "plan.layers=1"]
    assert "score.blocks=[2]" in refused(capsys, *plan, "plan.layer_choice=contiguous")
    assert "run score with the same plan.layers" in refused(
        capsys, *plan, "plan.layer_choice=greedy"
    )


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_a_baseline_ranks_layers_unless_depth_is_none(capsys, tmp_path, words, importance):
    words = [*words, f"score.importance={importance}", "score.aggregation.also=[]"]
    found = score(tmp_path / "ws", words)
    without = score(tmp_path / "none", words, "score.depth=none")
    assert {*found.ranking} - {*without.ranking} == {"layers"}
    capsys.readouterr()
    plan = ["plan", f"workspace={tmp_path / 'ws'}", *words, "plan.layers=1"]
    line = refused(capsys, *plan, "plan.layer_choice=contiguous")
    assert (
        f"score.importance={importance} measures no blocks of layers; take plan.layer_choice"
        in line
    )


def test_layers_ranked_by_a_task(tmp_path, teacher, corpus):
    words = [
        f"source.model={teacher}", f"data.train.paths=[{corpus}]", "data.holdout=0.3",
        "data.calibration.samples=4", "data.calibration.sequence_length=16", "score.depth=task",
        "score.tasks=[held_out_choice]", "score.task_limit=20",
    ]  # fmt: skip
    scores = score(tmp_path / "ws", words, "plan.layers=1", "plan.layer_choice=greedy")
    sums = scores.calibration.depth["task", 1]
    assert 0 <= sums.base <= 1 and ((sums.total >= 0) & (sums.total <= 1)).all()
    assert torch.allclose(scores.ranking["layers"], sums.base - sums.total)
    assert len(set(scores.greedy)) == 2
    # by hand: the accuracy of the checkpoint that really lacks the layer
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.data.documents import documents, find_text
    from nemo_minitron.evaluation.task_accuracy import accuracy_without
    from nemo_minitron.models.causal_lm import load_model
    from tests.support.models import stream

    cut = stream(teacher, tmp_path / "cut", {}, (0, 2))
    texts = find_text([str(corpus)], [], "auto", "text", "data.train", "held_out", 0.3)
    found = accuracy_without(
        load_model(cut), open_checkpoint(cut), ["held_out_choice@0"], None, lambda: documents(texts), 20, 8,
        1, frozenset(),
    )  # fmt: skip
    assert found.base == pytest.approx(float(sums.total[1]))
    # the questions are made of the text that is held out: another one makes other scores
    other = [
        f"workspace={tmp_path / 'ws'}",
        *words,
        f"data.validation.paths=[{corpus}]",
        "data.holdout=0.2",
    ]
    before, after = (
        [
            (each.path, each.fingerprint)
            for each in recipe_of_scores(load_config("config", given)).inputs
        ]
        for given in (other[:-2], other)
    )
    assert len(before) == len(after) == 3 and before[0] == after[0] and before[2] != after[2]


def test_rounds_of_score_and_cut_go_down_the_line(tmp_path, words):
    targets = ["plan.hidden=12", "plan.ffn=10", "plan.heads=3"]
    place = tmp_path / "ws"
    once = score(tmp_path / "once", words)
    scores = score(place, words, *targets, "score.iterations=3")
    # after two of three rounds 20 of 40 neurons are left: those that went are below zero, in two steps
    ffn = scores.ranking["ffn"]
    assert ((ffn < 0).sum(-1) == 20).all()
    assert ((ffn < -1).sum(-1) == 10).all()
    # of 24 channels 20 and 16 are on the line; a Llama has a multiple of its 6 heads: 24 and 18
    hidden, lowest = scores.ranking["hidden"], once.ranking["hidden"].argsort()[:6]
    assert set((hidden < 0).nonzero().flatten().tolist()) == set(lowest.tolist())
    assert set(ffn[0].argsort()[:10].tolist()) == set(
        once.ranking["ffn"][0].argsort()[:10].tolist()
    )
    assert main(["plan", f"workspace={place}", *words, *targets, "score.iterations=3"]) == 0
    keep = read_plan(place / "plan").keep
    assert {axis: index.shape[-1] for axis, index in keep.items()} == {
        "hidden": 12,
        "ffn": 10,
        "heads": 3,
    }
    assert (ffn.gather(1, keep["ffn"]) >= 0).all() and (hidden[keep["hidden"]] >= 0).all()
    # scores of rounds that cut otherwise, as they once did, are others; those of one round stay as they were
    found = [read_manifest(folder / "scores") for folder in (place, tmp_path / "once")]
    assert ["sizes_between" in manifest.config for manifest in found if manifest] == [True, False]
    line = minitron("score", f"workspace={place}", *words, "score.iterations=2")
    assert line.returncode == 2 and "no target size given" in line.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score.shard=4/3", "expected i/n"),
        ("score.shard=1/99", "11 samples cannot be split into 99 parts"),
        ("score.blocks=[3]", "score.blocks: expected lengths of 1 to 2, found 3"),
        (
            "score.aggregation.also=[max]",
            "score.aggregation.also: expected some of l2, mean, var, found 'max'",
        ),
        ("score.depth=task", "score.depth=task: no task given"),
        ("score.merge=[/nowhere]", "no scores from activations there"),
        ("data.calibration.weights=[1,2]", "expected a positive weight for each of 1 paths"),
        (
            "score.depth=none plan.layers=2 plan.layer_choice=greedy",
            "plan.layer_choice=greedy: removes layers by what score.depth measures",
        ),
        *(
            (
                f"score.importance={way} score.aggregation.also=[] {asked}",
                f"{asked.split()[0]}: for forward passes over text, and "
                f"score.importance={way} makes none; leave it out, or score with",
            )
            for way, asked in (
                ("magnitude", "score.depth=lm_loss"),
                ("random", "score.depth=task"),
                ("magnitude", "plan.layer_choice=greedy plan.layers=1"),
            )
        ),
        *(
            (
                f"score.importance=magnitude score.aggregation.also=[] {key}={value}",
                f"{key}: for forward passes over text",
            )
            for key, value in (
                ("score.experts", "own_tokens"),
                ("score.neurons", "pre_activation"),
                ("score.blocks", "[2]"),
                ("score.tasks", "[winogrande]"),
                ("score.iterations", "2"),
                ("score.shard", "1/2"),
                ("score.merge", "[/nowhere]"),
            )
        ),
        (
            "score.importance=magnitude score.aggregation.batch=mean",
            "score.aggregation: for forward",
        ),
        ("data.calibration.packing=documents", None),
        ("data.calibration.packing=off", None),
    ],
)
def test_settings_that_cannot_be(capsys, tmp_path, words, override, message):
    if message is None:
        score(tmp_path / "ws", words, override)
        return
    line = refused(capsys, "score", f"workspace={tmp_path / 'ws'}", *words, *override.split())
    assert message in line
    assert not (tmp_path / "ws" / "scores").exists()


def test_a_wrong_setting_leaves_the_scores_that_are_there(capsys, tmp_path, words):
    score(tmp_path / "ws", words)
    capsys.readouterr()
    before = (tmp_path / "ws" / "scores" / "scores.safetensors").read_bytes()
    refused(
        capsys, "score", f"workspace={tmp_path / 'ws'}", *words, "data.calibration.samples=999999"
    )
    assert (tmp_path / "ws" / "scores" / "scores.safetensors").read_bytes() == before
    assert main(["verify", str(tmp_path / "ws")]) == 0


def test_auto_streams_where_the_model_does_not_fit_and_says_so(tmp_path, tokenizer_folder, corpus):
    """A model of 0.6 GB under a limit of 0.4 GB beyond what the imports take."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 8192,
        "num_hidden_layers": 1,
        "vocab_size": 300,
    }
    folder = make_model(tmp_path / "big", "llama", **sizes, num_attention_heads=8, num_key_value_heads=8,
                        head_dim=64)  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10}))
    one = load_file(folder / "model.safetensors")
    many = {name.replace("layers.0.", f"layers.{layer}."): tensor.clone() for layer in range(10) for name, tensor in one.items()}  # fmt: skip
    save_file(many, folder / "model.safetensors", metadata={"format": "pt"})
    del many
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    size = (folder / "model.safetensors").stat().st_size
    assert size > 5e8
    words = [f"source.model={folder}", f"data.calibration.paths=[{corpus}]", "data.calibration.samples=4",
             "data.calibration.sequence_length=32", "score.activation_budget=100000"]  # fmt: skip

    def run(place, *more):
        process = started("score", f"workspace={place}", *words, *more, "--json")
        most = psutil.Process(process.pid).memory_info().data + 400_000_000
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (most, most))
        return process, *process.communicate(timeout=300)

    done, out, err = run(tmp_path / "auto")
    assert done.returncode == 0, err[-2000:]
    (note,) = json.loads(out)["notes"]
    assert note.startswith("score.streaming: on, for the model needs about ")
    done, _, err = run(tmp_path / "memory", "score.streaming=off")
    assert done.returncode == 1 and "memory" in err, err  # it really does not fit
    assert same(read_scores(tmp_path / "auto" / "scores"), score(tmp_path / "free", words), 1e-4)
