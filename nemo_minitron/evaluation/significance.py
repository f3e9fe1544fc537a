"""Are two models' results on the same documents different? Plain statistics, no model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Difference of two models on the same documents.

    Attributes:
        difference: mean of (second - first).
        error: its standard error; 0 where all differences are equal, None where there is one document.
        p: how likely a difference of this size or more would be if both were equally good,
            two-sided; None where there is one document, which says nothing of others.
        documents: how many.
    """

    difference: float
    error: float | None
    p: float | None
    documents: int


def paired(
    first: Sequence[float], second: Sequence[float], documents: Sequence[int] | None = None
) -> Paired:
    """Compares two models document by document.

    Where every result is right or wrong the exact test of McNemar counts the documents that only
    one of them got right (Psychometrika 1947, a binomial test); otherwise the t test of pairs.
    Where several numbers are of one document they are alike, and its standard error is the
    cluster-robust one (Liang and Zeger, Biometrika 1986): that of the documents' sums of
    deviations, with as many degrees of freedom as there are documents, less one.

    Args:
        first: numbers of one model.
        second: of the other, in the same order.
        documents: which document each is of; None: each is one of its own.

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"paired: expected as many results of both, found {len(first)} and {len(second)}"
        )
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    mean, groups = math.fsum(gaps) / len(gaps), len(set(documents or range(len(gaps))))
    if groups == 1:
        return Paired(mean, None, None, 1)
    error = error_of_mean(gaps, documents)
    if documents is None and set(first) | set(second) <= {0.0, 1.0}:
        p = _binomial(sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps))
    elif mean == 0:
        p = 1.0
    else:
        p = 0.0 if error == 0 else _student(abs(mean) / error, groups - 1)
    return Paired(mean, error, p, groups)


def error_of_mean(values: Sequence[float], documents: Sequence[int] | None = None) -> float:
    """Standard error of a mean, cluster-robust where several values are of one document (see ``paired``).

    Args:
        values: one for each question or sample.
        documents: which document each is of; None: each is one of its own.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    sums: dict[int, float] = {}
    for value, document in zip(values, range(n) if documents is None else documents, strict=True):
        sums[document] = sums.get(document, 0.0) + value - mean
    groups = len(sums)
    return (
        math.sqrt(math.fsum(total**2 for total in sums.values()) * groups / max(1, groups - 1)) / n
    )


def _student(t: float, freedom: int) -> float:
    """Two-sided probability of a t so large or larger under Student's distribution."""
    from scipy import stats  # late: its import takes a second

    return float(2 * stats.t.sf(t, freedom))


def _binomial(wins: int, losses: int) -> float:
    """Two-sided probability that fair coins split this unevenly or more."""
    from scipy import stats

    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def recovered(
    teacher: float, pruned: float, student: float, higher_is_better: bool
) -> float | None:
    """Share of what the cut lost that the student has recovered: (student - pruned) / (teacher - pruned).

    None where the cut lost nothing.
    """
    lost = teacher - pruned
    return (student - pruned) / lost if (lost if higher_is_better else -lost) > 1e-9 else None
