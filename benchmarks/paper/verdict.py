"""Whether a claim holds: one rule for all experiments.

Of each seed a number is taken that is positive where the claim is right (a paired difference, so that what teachers
differ in drops out). With n seeds, mean m and standard deviation s, the one-sided 95 % bound is t s / sqrt(n), t of
Student's distribution with n - 1 degrees of freedom:

* *holds*: m is above the bound; *does not hold*: it is below minus the bound; else *not visible at this scale*.
* A claim that two things are equal carries a margin, in nats: it holds where the whole interval m ± bound lies within
  ± margin, does not hold where it lies outside, else it is not visible at this scale. Where no worse is claimed, being
  better by more than the margin is right, too.
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
        worse: variant that it is better than; of several the best counts.
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
        values: of each seed; of two variants their difference, positive where the claim is right.
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
    sign = 1.0 if claim.higher else -1.0
    values = []
    for seed in range(seeds):
        own = [rows[name][seed].get(claim.metric) for name in every]
        if any(value is None for value in own):
            return None
        first, *others = (float(value) for value in own if value is not None)
        best = (max if claim.higher else min)(others) if others else claim.least
        values.append(sign * (first - best) if others else first)
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if seeds > 1 else None
    judged = [value - claim.least for value in values] if not claim.worse else values
    return Judged(claim, tuple(values), mean, spread, _verdict(claim, judged))


def _verdict(claim: Claim, values: Sequence[float]) -> str:
    mean, seeds = statistics.fmean(values), len(values)
    if claim.exact:
        return HOLDS if abs(mean) <= (claim.margin or 0.0) else FAILS
    if seeds < 2:
        return UNSEEN
    bound = student.ppf(CERTAINTY, seeds - 1) * statistics.stdev(values) / math.sqrt(seeds)
    if claim.margin is None:
        return HOLDS if mean > bound else FAILS if mean < -bound else UNSEEN
    low, high = mean - bound, mean + bound
    if claim.one_sided:
        high, low = min(high, claim.margin), min(low, claim.margin)
    if -claim.margin <= low and high <= claim.margin:
        return HOLDS
    return FAILS if low > claim.margin or high < -claim.margin else UNSEEN
