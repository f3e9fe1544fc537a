"""What a search may cost: a target, upper bounds, a speed-up; checked against the source and each other."""

import math
from collections.abc import Mapping

from nemo_minitron.config.plan_config import BudgetConfig

BOUNDS = (
    "parameters", "active", "non_embedding", "weight_bytes", "memory_bytes", "kv_bytes_per_token",
    "flops_per_token", "latency_ms",
)  # fmt: skip
"""Keys of ``plan.budget`` that are upper bounds, each named like the cost that it bounds."""
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}
"""Bits of a number, by the name of its dtype."""
Limits = dict[str, tuple[float, float]]
"""Measure to the least and the most that is allowed."""
_PARTS = (
    ("active", "parameters"),
    ("non_embedding", "parameters"),
    ("weight_bytes", "memory_bytes"),
)
"""Costs that are a part of another."""


def asks_for_search(budget: BudgetConfig) -> str | None:
    """The first key of ``plan.budget`` that asks for a search; None: none does."""
    named = ("params", *BOUNDS, "speedup")
    return next((name for name in named if getattr(budget, name) is not None), None)


def needs_latency(budget: BudgetConfig) -> bool:
    """Whether a bound is one of time."""
    return budget.latency_ms is not None or budget.speedup is not None


def limits_of(budget: BudgetConfig, source: Mapping[str, float]) -> Limits:
    """The limits of a budget.

    Args:
        budget: the keys.
        source: the source's costs.

    Raises:
        ValueError: no key is set; the bounds contradict each other; the source keeps them all as it
            is.
    """
    limits: Limits = {}
    for name in BOUNDS:
        bound = getattr(budget, name)
        if bound is not None:
            limits[name] = (0.0, float(bound))
    if budget.speedup is not None:
        most = source["latency_ms"] / budget.speedup
        limits["latency_ms"] = (0.0, min(most, limits.get("latency_ms", (0.0, math.inf))[1]))
    if budget.params is not None:
        least, most = (budget.params * (1 + sign * budget.tolerance) for sign in (-1, 1))
        limits[budget.measure] = _both(budget, (least, most), limits.get(budget.measure))
    if not limits:
        raise ValueError("plan.budget: expected a target (params) or a bound, found none")
    _check(budget, limits)
    if all(least <= source[name] <= most for name, (least, most) in limits.items()):
        raise ValueError(
            "plan.budget: the model as it is keeps every bound, and nothing has to be cut: "
            + ", ".join(f"{name} {source[name]:,.6g}" for name in limits)
        )
    return limits


def _both(
    budget: BudgetConfig, window: tuple[float, float], bound: tuple[float, float] | None
) -> tuple[float, float]:
    """The window around the target, below an upper bound of the same measure."""
    if bound is None:
        return window
    if window[0] > bound[1]:
        raise ValueError(
            f"plan.budget.params: asks for {window[0]:,.10g} {budget.measure} or more, and "
            f"plan.budget.{budget.measure} for at most {bound[1]:,.10g}"
        )
    return window[0], min(window[1], bound[1])


def _check(budget: BudgetConfig, limits: Limits) -> None:
    """Refuses a target that needs more of another cost than a bound allows.

    Raises:
        ValueError: it does.
    """
    least = {name: low for name, (low, _) in limits.items() if low > 0}
    for part, total in _PARTS[:2]:
        if part in least:
            least[total] = max(least[part], least.get(total, 0))
    if "parameters" in least:
        least["weight_bytes"] = least["parameters"] * BITS[budget.dtype] / 8
        least["memory_bytes"] = least["weight_bytes"]
    if "kv_bytes_per_token" in least:
        cache = least["kv_bytes_per_token"] * budget.batch * budget.context
        least["memory_bytes"] = least.get("memory_bytes", 0) + cache
    for name, low in least.items():
        most = limits[name][1] if name in limits else math.inf
        if low > most:
            raise ValueError(
                f"plan.budget.params: {budget.params:,.10g} {budget.measure} (within {budget.tolerance:g}) "
                f"mean {name} of {low:,.10g} or more, and plan.budget.{name} allows {most:,.10g}"
            )


def share_of(limits: Mapping[str, tuple[float, float]], source: Mapping[str, float]) -> float:
    """The part of the source's cost that the tightest limit leaves, for a default grid."""
    shares = [
        ((least + most) / 2 if least > 0 else most) / source[name]
        for name, (least, most) in limits.items()
        if source[name] > 0
    ]
    return min(shares, default=1.0)
