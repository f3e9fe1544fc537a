"""Experts by their own tokens, and which texts use which: the same on every way, and nothing else changes."""

import json

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.plan_file import read_plan
from nemo_minitron.pruning.size_search import candidates
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.pass_in_memory import in_memory
from nemo_minitron.scoring.routing import effective_experts, kept_share, overlap, routing_notes
from nemo_minitron.scoring.scores_file import Scores, read_scores, write_scores
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.score import recipe
from nemo_minitron.workspace.manifest import read_manifest
from tests.support.models import INSTALLED, stream
from tests.support.runs import refused
from tests.support.text_samples import padded
from tests.support.two_ranks import on_two_ranks


def routed(name):
    return "experts" in families()[name].taps


OWN, ALL = "score.experts=own_tokens", "score.experts=all_tokens"


@pytest.fixture
def words(mixture, corpus, tmp_path):
    """A mixture of experts, and two texts of other words."""
    (tmp_path / "digits.txt").write_text("".join(f"{n} {n * n}\n" for n in range(3000)))
    paths = f"{corpus},{tmp_path}/digits.txt"
    return [
        f"source.model={mixture}", f"data.calibration.paths=[{paths}]", "data.calibration.weights=[3,1]",
        "data.calibration.samples=12", "data.calibration.sequence_length=16", "score.batch_size=6",
        "score.depth=none",
    ]  # fmt: skip


def score(place, words, *more):
    assert main(["score", f"workspace={place}", *words, *more]) == 0
    return read_scores(place / "scores")


def same(found, expected):
    """Rankings to rounding, and counts."""
    assert found.calibration.samples == expected.calibration.samples
    assert torch.equal(found.calibration.by_text, expected.calibration.by_text)
    for axis, ranking in expected.ranking.items():
        assert torch.allclose(found.ranking[axis], ranking, rtol=1e-4, atol=1e-7), axis
    return True


def test_own_tokens_are_the_same_streamed_grown_merged_and_on_two_ranks(tmp_path, words):
    words = [*words, OWN]
    whole = score(tmp_path / "whole", words)
    assert same(score(tmp_path / "streamed", words, "score.streaming=on"), whole)
    score(tmp_path / "grown", words, "data.calibration.samples=7")
    assert same(score(tmp_path / "grown", words), whole)
    for part in "12":
        score(tmp_path / part, words, f"score.shard={part}/2")
    parts = f"score.merge=[{tmp_path}/1,{tmp_path}/2]"
    assert same(score(tmp_path / "merged", words, parts), whole)
    done = on_two_ranks("score", *words, f"workspace={tmp_path / 'ranks'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(read_scores(tmp_path / "ranks" / "scores"), whole)


def test_the_score_over_all_tokens_keeps_its_bytes_and_a_dense_model_its_fingerprint(
    tmp_path, words, teacher
):
    score(tmp_path / "all", words, ALL)
    own = score(tmp_path / "own", words, OWN)
    assert "experts" not in read_manifest(tmp_path / "all" / "scores").config
    assert read_manifest(tmp_path / "own" / "scores").config["experts"] == "own_tokens"
    before = read_scores(tmp_path / "all" / "scores").ranking
    assert not torch.allclose(before["experts"], own.ranking["experts"])
    assert all(torch.equal(before[axis], own.ranking[axis]) for axis in before if axis != "experts")
    score(tmp_path / "own", words, ALL)  # another ranking of the same sums
    files = [tmp_path / name / "scores" / "scores.safetensors" for name in ("all", "own")]
    assert files[0].read_bytes() == files[1].read_bytes()
    dense = [f"workspace={tmp_path}/dense", f"source.model={teacher}", *words[1:]]
    assert main(["download", *dense]) == 0
    settings = [recipe(load_config("config", [*dense, word])).settings for word in (OWN, ALL)]
    assert settings[0] == settings[1] and "experts" not in settings[0]


def test_a_table_and_a_picture_say_which_text_uses_which_experts(tmp_path, words, capsys):
    found = score(tmp_path / "ws", words, "--json")
    result = json.loads(capsys.readouterr().out)
    table = json.loads((tmp_path / "ws" / "scores" / "routing.json").read_text())["texts"]
    corpus, digits = (one["text"] for one in table)
    assert digits.endswith("digits.txt") and [corpus, digits] == list(
        result["facts"]["effective_experts"]
    )
    counts = torch.tensor([one["tokens_of_experts"] for one in table])
    assert torch.equal(counts.sum(0), found.calibration.routed["experts"])
    tokens = counts.sum(-1)  # 9 and 3 samples of 16 tokens, each of which goes to two experts
    assert tokens.tolist() == [[9 * 16 * 2] * 3, [3 * 16 * 2] * 3]
    assert any(note.startswith(f"{plain(digits, 80)}: uses ") for note in result["notes"])
    assert (tmp_path / "ws" / "scores" / "plots" / "routing.png").stat().st_size > 5000
    assert main(["verify", str(tmp_path / "ws")]) == 0
    # and the plan says what is left of each
    capsys.readouterr()
    assert main(["plan", f"workspace={tmp_path}/ws", *words, "plan.experts=4", "--json"]) == 0
    (note,) = [
        note for note in json.loads(capsys.readouterr().out)["notes"] if "digits.txt" in note
    ]
    assert note.startswith("of each text's choices of experts, those that stay had: ")


def test_one_text_has_one_row_and_sums_without_counts_make_no_table(tmp_path, words):
    unweighted = [word for word in words if "weights" not in word]
    score(tmp_path / "one", unweighted, "data.calibration.samples=7")
    grown = score(tmp_path / "one", unweighted)
    (row,) = json.loads((tmp_path / "one" / "scores" / "routing.json").read_text())["texts"]
    assert row["text"] == "data.calibration"
    assert row["tokens_of_experts"] == grown.calibration.routed["experts"].tolist()
    # of samples that were scored before tokens were counted the table would tell a part for the whole
    score(tmp_path / "old", words, "data.calibration.samples=7")
    manifest = tmp_path / "old" / "scores" / "manifest.json"
    written = json.loads(manifest.read_text())
    written["outputs"] = [one for one in written["outputs"] if one["file"] != "routing.json"]
    manifest.write_text(json.dumps(written))
    (tmp_path / "old" / "scores" / "routing.json").unlink()
    assert score(tmp_path / "old", words).calibration.by_text is None


def test_a_damaged_table_is_told_by_name(tmp_path, words, capsys):
    folder = tmp_path / "scores"
    folder.mkdir()
    scores = Scores({"experts": torch.ones(3, 8).double()})
    write_scores(folder, scores)
    (folder / "routing.json").write_text(
        '{"texts": [{"text": "a", "tokens_of_experts": [[1], [1, 2]]}]}'
    )
    with pytest.raises(
        ValueError, match=r"routing.json: damaged: expected for each text and layer"
    ):
        read_scores(folder)


def test_the_numbers_of_a_table():
    even, one = torch.tensor([[5, 5, 5, 5]]), torch.tensor([[0, 0, 0, 9]])
    assert effective_experts(even) == pytest.approx(4)
    assert effective_experts(one) == pytest.approx(1)
    assert effective_experts(torch.zeros(1, 4, dtype=torch.int64)) == 0
    assert overlap(even, one) == pytest.approx(0.25) and overlap(one, one) == pytest.approx(1)
    assert kept_share(even, torch.tensor([[0, 3]])) == pytest.approx(0.5)
    assert kept_share(one, torch.tensor([[0, 1]])) == 0
    lines = routing_notes(["en", "a\x1b[31m"], torch.stack([one, one]))
    assert "\x1b" not in "".join(lines) and lines[-1].startswith("3 of 4 experts get less than")


@pytest.mark.parametrize("name", [name for name in sorted(INSTALLED) if routed(name)])
def test_fewer_experts_for_a_token_in_every_family_that_has_them(tmp_path, name):
    """As many as the student's config.json says are visited, whatever the key is called."""
    family = families()[name]
    for number, changes in enumerate(family.proofs):
        folder = tiny_model(family, changes, tmp_path / f"m{number}")
        source = open_checkpoint(folder)
        if "experts" in source.architecture.present:
            break
    assert "experts_per_token" in source.architecture.settable
    target = stream(folder, tmp_path / "fewer", {}, None, 1)
    counts = []
    for place in (folder, target):
        checkpoint = open_checkpoint(place)
        found = in_memory(load_model(place), checkpoint, padded(), [[1, 3]], Measures())
        layers = checkpoint.architecture.present["experts"]
        counts.append(
            found.routed["experts"][layers].sum(-1) / (2 * 12)
        )  # two samples without padding
        assert (counts[-1] == checkpoint.architecture.sizes["experts_per_token"]).all()
    assert counts[1].max() == 1
    assert (
        model_size(open_checkpoint(target).architecture).active
        <= model_size(source.architecture).active
    )


def test_a_plan_of_fewer_experts_for_a_token_takes_no_scores(tmp_path, words, capsys):
    place, wanted = tmp_path / "ws", ["plan.experts_per_token=1"]
    for stage in ("plan", "prune"):
        assert main([stage, f"workspace={place}", *words, *wanted]) == 0
    plan = read_plan(place / "plan")
    assert (plan.before["experts_per_token"], plan.after["experts_per_token"]) == (2, 1)
    assert plan.cost_after.parameters == plan.cost_before.parameters
    assert plan.cost_after.active < plan.cost_before.active
    assert json.loads((place / "pruned" / "config.json").read_text())["num_experts_per_tok"] == 1
    capsys.readouterr()
    assert main(["size", str(place / "pruned"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["active"] == plan.cost_after.active
    source = words[0].removeprefix("source.model=")
    assert main(["size", source, "experts_per_token=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["active"] == plan.cost_after.active
    # another number is another plan
    assert main(["plan", f"workspace={place}", *words, "plan.experts_per_token=2"]) == 0
    assert read_plan(place / "plan").after["experts_per_token"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["plan.experts_per_token=3"],
            "plan.experts_per_token: expected 1 to 2 (the source's size)",
        ),
        (["plan.experts_per_token=0"], "plan.experts_per_token: expected at least 1"),
        (["plan.experts=1"], "mixtral needs experts >= experts_per_token"),
    ],
)
def test_numbers_of_experts_that_cannot_be(tmp_path, words, capsys, more, message):
    assert message in refused(capsys, "plan", f"workspace={tmp_path}/ws", *words, *more)


def test_a_dense_model_has_no_experts_for_a_token(tmp_path, words, teacher, capsys):
    dense = [f"source.model={teacher}", *words[1:], "plan.experts_per_token=1"]
    line = refused(capsys, "plan", f"workspace={tmp_path}/ws", *dense)
    assert "plan.experts_per_token: this model has no prunable axis of that name" in line


def test_a_search_may_choose_the_experts_for_a_token(mixture):
    model = open_checkpoint(mixture).architecture
    whole = model_size(model).active
    found = candidates(model, {"experts_per_token": [1, 2]}, 1, whole, "active")
    assert [one.sizes["experts_per_token"] for one in found] in ([1, 2], [2, 1])
    assert min(one.size.active for one in found) < whole
