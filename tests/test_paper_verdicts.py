"""What the page of the papers' claims rests on: the rule of a verdict, and the claims' own names."""

import importlib

import pytest

from benchmarks.paper.checks.flops import MODELS, step
from benchmarks.paper.family_cost import paper_flops
from benchmarks.paper.page import EXPERIMENTS, _number
from benchmarks.paper.pictures import curves
from benchmarks.paper.profiles import PROFILES
from benchmarks.paper.token_factor import factor
from benchmarks.paper.verdict import FAILS, HOLDS, UNSEEN, Claim, judge


def rows(ours: list[float], theirs: list[float]) -> dict[str, list[dict[str, float]]]:
    return {"ours": [{"loss": x} for x in ours], "theirs": [{"loss": x} for x in theirs]}


@pytest.mark.parametrize(
    ("ours", "theirs", "margin", "one_sided", "verdict"),
    [
        ([3.0, 3.2, 3.1], [3.5, 3.6, 3.55], None, False, HOLDS),
        ([3.5, 3.6, 3.55], [3.0, 3.2, 3.1], None, False, FAILS),
        ([3.0, 3.2, 3.1], [3.5, 3.1, 3.0], None, False, UNSEEN),
        ([3.0], [3.5], None, False, UNSEEN),
        ([3.0, 3.2, 3.1], [3.001, 3.2, 3.102], 0.02, False, HOLDS),
        ([3.0, 3.2, 3.1], [3.5, 3.6, 3.55], 0.02, False, FAILS),
        ([3.0, 3.2, 3.1], [3.5, 3.6, 3.55], 0.02, True, HOLDS),
        ([3.5, 3.6, 3.55], [3.0, 3.2, 3.1], 0.02, True, FAILS),
        ([3.0, 3.2, 3.1], [3.03, 3.2, 3.08], 0.02, False, UNSEEN),
    ],
)
def test_a_verdict_needs_a_difference_beyond_its_spread(ours, theirs, margin, one_sided, verdict):
    claim = Claim("", "", "ours", ("theirs",), margin=margin, one_sided=one_sided)
    found = judge(claim, rows(ours, theirs))
    assert found is not None and found.verdict == verdict


def several(ours: list[float], *others: list[float]) -> dict[str, list[dict[str, float]]]:
    every = {"ours": ours} | {f"other {i}": of for i, of in enumerate(others)}
    return {name: [{"loss": x} for x in of] for name, of in every.items()}


@pytest.mark.parametrize(
    ("others", "values", "verdict"),
    [
        # better than each of them, whichever is the best of a seed
        ([[3.4, 3.2, 3.3], [3.2, 3.3, 3.35]], (0.2, 0.3, 0.35), HOLDS),
        # equals: of each seed another one happens to be the best
        ([[2.9, 3.1, 3.1], [3.1, 2.9, 3.1], [3.1, 3.1, 2.9]], (-0.1, 0.1, 0.1), UNSEEN),
        # one is better, of all seeds alike
        ([[2.9, 2.91, 2.92], [3.1, 3.1, 3.1], [3.1, 3.1, 3.1]], (-0.1, -0.09, -0.08), FAILS),
        # better at 95 % (t = 3.46), which of four says little
        ([[2.8, 2.9, 2.9], *[[3.1, 3.1, 3.1]] * 3], (-0.2, -0.1, -0.1), UNSEEN),
    ],
)
def test_a_claim_against_several_is_about_each_of_them(others, values, verdict):
    rows = several([3.0, 3.0, 3.0], *others)
    names = tuple(name for name in rows if name != "ours")
    found = judge(Claim("", "", "ours", names), rows)
    assert found is not None and found.verdict == verdict
    assert found.values == pytest.approx(values)


def test_a_claim_without_its_variants_is_not_judged():
    assert judge(Claim("", "", "ours", ("missing",)), rows([3.0], [3.1])) is None


def test_a_picture_of_which_only_the_teacher_is_measured_is_drawn():
    figure = curves({}, "steps", "teacher 3.100", 3.1)
    assert "teacher 3.100" in {text.get_text() for text in figure.axes[0].texts}


def test_nothing_is_less_than_nothing():
    assert [_number(x) for x in (-0.0004, -0.0006, 1234.5)] == ["0.000", "-0.001", "1,234"]


def test_the_token_factor_lies_between_the_two_around_the_loss():
    found = factor([(1, 4.0), (4, 3.5), (16, 3.0)], 3.25)
    assert found == {"factor": pytest.approx(8.0), "reached": 1.0}
    assert factor([(1, 4.0), (4, 3.5)], 3.0) == {"factor": 4.0, "reached": 0.0}


def test_our_counter_says_what_the_papers_sizes_cost_by_hand():
    for causal, attended in ((False, 4096), (True, 2048)):
        found = paper_flops(causal)
        assert found == {name: step(*sizes, attended) for name, sizes in MODELS.items()}


@pytest.mark.parametrize("profile", PROFILES)
def test_width_depth_and_both_are_of_one_size(profile):
    from nemo_minitron.families import Architecture, families
    from nemo_minitron.pruning.cost import count_tensors, sums

    own = PROFILES[profile]
    model = Architecture(families()["nemotron"], own.models["nemotron"])
    counts = count_tensors(model)
    found = []
    for name in ("width", "depth", "both"):
        sizes = {**model.sizes, **own.sizes[name]}
        layers = sizes["layers"] / model.sizes["layers"]
        whole = sums(counts, sizes)
        found.append(whole["non_embedding"] * layers + whole["parameters"] - whole["non_embedding"])
    assert max(found) < 1.02 * min(found)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_what_it_does(name):
    module = importlib.import_module(f"benchmarks.paper.{name}")
    assert module.__doc__ and "Protocol:" in module.__doc__ and module.TITLE and module.CLAIMS
