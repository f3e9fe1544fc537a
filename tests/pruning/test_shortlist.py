"""Which sizes are measured: spread out, then where the others point, and not the same thing twice."""

import numpy as np
import pytest

from nemo_minitron.pruning.shortlist import (
    pool,
    predicted,
    promising,
    rank_correlation,
    spread,
    varied,
)


def grid():
    return np.log(
        np.array([(a, b) for a in np.linspace(0.3, 1, 15) for b in np.linspace(0.3, 1, 15)])
    )


def test_the_spread_begins_evenly_and_reaches_the_corners():
    points = grid()
    rows = spread(points, 5)
    assert points[rows[0]][0] == pytest.approx(points[rows[0]][1])
    corners = {tuple(np.round(np.exp(points[row]), 2)) for row in rows}
    assert {(0.3, 1.0), (1.0, 0.3)} <= corners
    assert spread(np.zeros((4, 2)), 3) == [0]  # the same size four times


@pytest.mark.parametrize("judge", ["loss", "accuracy"])
def test_a_few_measurements_lead_to_the_best_of_many(judge):
    points = grid()
    loss = (points[:, 0] + 0.4) ** 2 + 2 * (points[:, 1] + 0.7) ** 2
    if judge == "accuracy":  # less is better of what is judged: 65 % right at best are -0.65
        loss = 0.2 * loss - 0.65
    known = spread(points, 12)
    values = [loss[row] for row in known]
    values[3] = float("nan")  # a cut that broke the model
    best = promising(points, known, values, 6)
    assert not set(best) & set(known)
    assert min(loss[row] for row in best) <= sorted(loss)[5]


def test_a_broken_model_counts_as_thrice_the_median_and_does_not_bend_the_fit():
    points = grid()
    loss = 3 + points[:, 0] ** 2
    known = spread(points, 12)
    values = [loss[row] for row in known]
    capped = predicted(points, known, [3 * np.median([*values[:-1], 1e9]), *values[1:]])
    assert predicted(points, known, [1e9, *values[1:]]) == pytest.approx(capped)


def test_of_two_that_are_almost_alike_the_better_goes_on():
    points = np.array([[0.0, 0.0], [0.001, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert varied(points, [1.0, 1.1, 2.0, 3.0, float("nan")], 3) == [0, 2, 3]
    assert varied(points, [1.1, 1.0, 2.0, 3.0, float("nan")], 5) == [1, 0, 2, 3, 4]
    assert varied(points[:1], [1.0], 4) == [0]


def test_a_pool_is_the_same_every_time():
    rows = np.arange(1000)
    assert pool(rows, 50).tolist() == pool(rows, 50).tolist()
    assert len(set(pool(rows, 50))) == 50 and pool(rows, 2000) is rows


def test_rank_correlation():
    nan = float("nan")
    assert rank_correlation([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, nan], [3, 2, 1, 0]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
