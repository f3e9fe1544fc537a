"""Statistics of pairs against SciPy's."""

import random

import pytest
from scipy import stats

from nemo_minitron.evaluation.significance import paired, recovered


@pytest.mark.parametrize("seed", range(5))
def test_right_or_wrong_is_counted_as_mcnemar_does(seed):
    draw = random.Random(seed)
    first = [float(draw.random() < 0.6) for _ in range(200)]
    second = [value if draw.random() < 0.8 else 1 - value for value in first]
    found = paired(first, second)
    wins = sum(b > a for a, b in zip(first, second, strict=True))
    losses = sum(b < a for a, b in zip(first, second, strict=True))
    assert found.p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)
    assert found.difference == pytest.approx((wins - losses) / 200)
    assert found.documents == 200


def test_other_measures_are_compared_by_their_mean_difference():
    draw = random.Random(0)
    first = [draw.gauss(2, 1) for _ in range(400)]
    second = [value + draw.gauss(0.05, 0.5) for value in first]
    found, exact = paired(first, second), stats.ttest_rel(second, first)
    assert found.p == pytest.approx(exact.pvalue, rel=1e-6)
    assert found.difference / found.error == pytest.approx(exact.statistic, rel=1e-9)


@pytest.mark.parametrize("documents", [2, 3, 8, 31, 700])
def test_few_documents_need_a_larger_difference(documents):
    draw = random.Random(documents)
    first = [draw.gauss(2, 1) for _ in range(documents)]
    second = [value + draw.gauss(0.1, 0.3) for value in first]
    assert paired(first, second).p == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=1e-6)
    alone = paired([2.0], [2.5])
    assert (alone.difference, alone.error, alone.p) == (
        0.5,
        None,
        None,
    )  # one says nothing of others
    of_one = paired([2.0, 2.5], [2.5, 2.75], [7, 7])
    assert (of_one.difference, of_one.error, of_one.p, of_one.documents) == (0.375, None, None, 1)


def test_no_difference_a_constant_one_and_bad_input():
    assert paired([1.5, 2.5], [1.5, 2.5]).p == 1.0
    assert paired([0.0, 1.0], [0.0, 1.0]).p == 1.0
    assert paired([1.5, 2.5], [1.0, 2.0]).p == 0.0
    with pytest.raises(ValueError, match="as many results of both, found 1 and 2"):
        paired([1.0], [1.0, 2.0])


def test_numbers_of_one_document_are_not_taken_for_independent():
    draw, alarms = random.Random(0), {"apart": 0, "together": 0}
    documents = [i // 16 for i in range(128)]
    for _ in range(200):  # no difference but what each document brings
        shifts = [draw.gauss(0, 0.3) for _ in range(8)]
        second = [shifts[document] + draw.gauss(0, 0.2) for document in documents]
        alarms["apart"] += paired([0.0] * 128, second).p < 0.05
        found = paired([0.0] * 128, second, documents)
        alarms["together"] += found.p < 0.05
        assert found.documents == 8
        means = [
            sum(second[16 * i : 16 * i + 16]) / 16 for i in range(8)
        ]  # of equal size: the test of means
        assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-6)
    assert alarms["together"] < 20 < 80 < alarms["apart"]
    assert paired([1.0, 2.0], [1.5, 3.0], [4, 4]).p is None  # one document says nothing
    one, other = (
        paired([1.0, 2.0, 4.0], [1.5, 3.0, 4.0], [7, 3, 5]),
        paired([1.0, 2.0, 4.0], [1.5, 3.0, 4.0]),
    )
    assert one == other


def test_what_was_won_back():
    assert recovered(0.8, 0.3, 0.7, True) == pytest.approx(0.8)
    assert recovered(10.0, 30.0, 12.0, False) == pytest.approx(0.9)
    assert recovered(0.5, 0.5, 0.6, True) is None
    assert recovered(0.3, 0.8, 0.9, True) is None  # the cut did it good: nothing was lost
