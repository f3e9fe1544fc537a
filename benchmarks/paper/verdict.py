"""Whether a claim holds: one rule for all experiments.

Of each seed a number is taken that is positive where the claim is right (a paired difference, so that what teachers
differ in drops out). With n seeds, mean m and standard deviation s, the one-sided 95 % bound is t s / sqrt(n), t of
Student's distribution with n - 1 degrees of freedom:

* *holds*: m is above the bound; *does not hold*: it is below minus the bound; else *not visible at this scale*.
* A claim that two things are equal carries a margin, in nats: it holds where the whole interval m ± bound lies within
  ± margin, does not hold where it lies outside, else it is not visible at this scale. Where no worse is claimed, being
  better by more than the margin is right, too.
* A claim against several variants holds where it holds against each of them. It does not hold where one of them is better
  beyond the bound of 1 - 5 % / their number: among eight equals one always looks better, so that the best of each seed,
  chosen after the fact, shows nothing.
* One seed shows nothing but exact numbers: *not visible at this scale*.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

Rows = Mapping[str, Sequence[Mapping[str, float]]]
"""Variant to what was measured of each seed."""
HOLDS, FAILS, UNSEEN = "holds", "does not hold", "not visible at this scale"
CERTAINTY = 0.95


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, as an experiment can judge it.

    Attributes:
        text: what is claimed.
        paper: the paper's number, and where it stands.
        better: variant that is claimed to be better; or, without ``worse``, to reach ``least``.
        worse: variants that it is better than, each of them.
        metric: what is compared.
        higher: whether a higher value is better.
        margin: of a claim of equality; None: better is meant.
        least: without ``worse``: what the value must reach.
        exact: whether the number needs no seeds.
        one_sided: of a claim with a margin: better by more is right, too.
    """

    text: str
    paper: str
    better: str
    worse: tuple[str, ...] = ()
    metric: str = "loss"
    higher: bool = False
    margin: float | None = None
    least: float = 0.0
    exact: bool = False
    one_sided: bool = False


@dataclass(frozen=True)
class Judged:
    """A claim with what was found.

    Attributes:
        claim: what is claimed.
        values: of each seed; the difference to the variant that is best over all seeds, positive where the claim is right.
        mean: of the seeds.
        spread: their standard deviation; None of one seed.
        verdict: *holds*, *does not hold* or *not visible at this scale*.
    """

    claim: Claim
    values: tuple[float, ...]
    mean: float
    spread: float | None
    verdict: str


def judge(claim: Claim, rows: Rows) -> Judged | None:
    """Judges a claim; None where a variant is not measured yet."""
    every = (claim.better, *claim.worse)
    if any(not rows.get(name) for name in every):
        return None
    seeds = min(len(rows[name]) for name in every)
    found = [[rows[name][seed].get(claim.metric) for seed in range(seeds)] for name in every]
    if any(value is None for of in found for value in of):
        return None
    ours, *others = ([float(value) for value in of if value is not None] for of in found)
    sign = 1.0 if claim.higher else -1.0
    apart = [[sign * (x - y) for x, y in zip(ours, of, strict=True)] for of in others]
    values = min(apart, key=statistics.fmean) if apart else ours
    spread = statistics.stdev(values) if seeds > 1 else None
    judged = apart or [[sign * (value - claim.least) for value in ours]]
    verdict = _of_all(claim, judged)
    return Judged(claim, tuple(values), statistics.fmean(values), spread, verdict)


def _of_all(claim: Claim, every: Sequence[Sequence[float]]) -> str:
    """The verdict over all variants that the claim names."""
    if all(_verdict(claim, values, CERTAINTY) == HOLDS for values in every):
        return HOLDS
    strict = 1 - (1 - CERTAINTY) / len(every)
    fails = any(_verdict(claim, values, strict) == FAILS for values in every)
    return FAILS if fails else UNSEEN


def _verdict(claim: Claim, values: Sequence[float], certainty: float) -> str:
    mean, seeds = statistics.fmean(values), len(values)
    if claim.exact:
        return HOLDS if abs(mean) <= (claim.margin or 0.0) else FAILS
    if seeds < 2:
        return UNSEEN
    bound = student.ppf(certainty, seeds - 1) * statistics.stdev(values) / math.sqrt(seeds)
    if claim.margin is None:
        return HOLDS if mean > bound else FAILS if mean < -bound else UNSEEN
    low, high = mean - bound, mean + bound
    if claim.one_sided:
        high, low = min(high, claim.margin), min(low, claim.margin)
    if -claim.margin <= low and high <= claim.margin:
        return HOLDS
    return FAILS if low > claim.margin or high < -claim.margin else UNSEEN
