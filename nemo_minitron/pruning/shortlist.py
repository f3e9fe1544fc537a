"""NumPy: which of very many sizes to measure: spread out first, then where what was measured points.

Sizes are compared by the logarithms of their shares of the source's. A quadratic in these (ridge
regression) tells the loss of those that were not measured from that of those that were.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.pruning.size_space import Space

_POOL = 20_000
"""Most sizes that are compared with each other."""


def shares(space: Space, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logarithms of the kept shares, Array of shape [indices, axes]; axes that nobody cuts are left out."""
    columns = [
        np.log(column[indices] / space.before[name])
        for name, column in space.sizes.items()
        if np.any(column != space.before[name])
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((len(indices), 1))


def pool(indices: NDArray[np.int64], most: int = _POOL, seed: int = 0) -> NDArray[np.int64]:
    """The indices, or so many of them, drawn without replacement, ascending."""
    if len(indices) <= most:
        return indices
    draw = np.random.default_rng(seed)
    return np.sort(draw.choice(indices, most, replace=False))


def spread(points: NDArray[np.float64], count: int) -> list[int]:
    """Rows far from each other: first the most even one, then ever the one farthest from all before.

    Args:
        points: Array of shape [rows, axes].
        count: how many; fewer where there are fewer rows that differ.
    """
    chosen = [int(np.argmin(points.std(axis=1)))]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < min(count, len(points)):
        farthest = int(np.argmax(distance))
        if distance[farthest] == 0:
            break
        chosen.append(farthest)
        distance = np.minimum(distance, np.linalg.norm(points - points[farthest], axis=1))
    return chosen


def predicted(
    points: NDArray[np.float64], known: Sequence[int], values: Sequence[float]
) -> NDArray[np.float64]:
    """Values of all rows from those of some: a quadratic without products of axes, by ridge regression.

    Args:
        points: Array of shape [rows, axes].
        known: rows whose values are known.
        values: theirs; what is not finite counts as the largest that is.
    """
    y = np.array(values, dtype=np.float64)
    finite = np.isfinite(y)
    if not finite.any():
        return np.zeros(len(points))
    # a cut that broke the model says where not to look, not how the loss falls elsewhere; values
    # below 0 (accuracies, turned so that less is better) have no such tail, and lie below this cap
    median = np.median(y[finite])
    y = np.minimum(np.where(finite, y, y[finite].max()), median + 2 * abs(median))
    scale = points.std(axis=0) + 1e-12
    x = (points - points.mean(axis=0)) / scale
    features = np.concatenate([np.ones((len(x), 1)), x, x**2], axis=1)
    own = features[list(known)]
    weight = np.eye(features.shape[1]) * 0.1
    weight[0, 0] = 1e-6
    beta = np.linalg.solve(own.T @ own + weight, own.T @ y)
    found: NDArray[np.float64] = features @ beta
    return found


def promising(
    points: NDArray[np.float64], known: Sequence[int], values: Sequence[float], count: int
) -> list[int]:
    """Rows to look at next: those of the least predicted values that were not looked at."""
    guess = predicted(points, known, values)
    guess[list(known)] = np.inf
    order = np.argsort(guess, kind="stable")
    return [int(row) for row in order[:count] if np.isfinite(guess[row])]


def varied(points: NDArray[np.float64], values: Sequence[float], count: int) -> list[int]:
    """Rows of the least values, none almost the same as a better one as long as others are left.

    What is best as it is cut need not be best after training: of two that are almost alike, the
    second says nothing new. Almost: nearer than a quarter of the median distance.

    Args:
        points: Array of shape [rows, axes].
        values: one for each row; NaN counts as the largest.
        count: how many.

    Returns:
        At most ``count`` rows, the least value first.
    """
    order = [int(row) for row in np.argsort(np.nan_to_num(values, nan=np.inf), kind="stable")]
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    near = np.median(apart[np.triu_indices(len(points), 1)]) / 4 if len(points) > 1 else 0.0
    chosen: list[int] = []
    for row in order:
        if len(chosen) < count and all(apart[row, other] > near for other in chosen):
            chosen.append(row)
    chosen += [row for row in order if row not in chosen][: count - len(chosen)]
    return sorted(chosen, key=order.index)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two series; None where one has fewer than three or does not vary."""
    from scipy.stats import rankdata

    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a == a and b == b]
    if len(pairs) < 3:
        return None
    ranks = [rankdata(series) for series in zip(*pairs, strict=True)]
    if any(np.ptp(series) == 0 for series in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])
