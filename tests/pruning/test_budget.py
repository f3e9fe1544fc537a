"""Bounds of a budget: each by itself, together, and against each other."""

import pytest

from nemo_minitron.config.plan_config import BudgetConfig
from nemo_minitron.pruning.budget import asks_for_search, limits_of, share_of
from nemo_minitron.pruning.size_space import Terms, source_costs
from tests.pruning.test_size_search import LLAMA, of

SOURCE = {**source_costs(of(LLAMA), Terms(batch=2, context=1000)), "latency_ms": 10.0}


def limits(**keys):
    return limits_of(BudgetConfig(batch=2, context=1000, **keys), SOURCE)


def test_a_target_is_a_window_and_bounds_are_upper_bounds():
    assert limits(params=4e9, tolerance=0.1)["parameters"] == pytest.approx((3.6e9, 4.4e9))
    assert limits(params=4e9, tolerance=0.1, parameters=4e9)["parameters"] == pytest.approx(
        (3.6e9, 4e9)
    )
    assert limits(memory_bytes=6e9, active=5e9) == {"memory_bytes": (0, 6e9), "active": (0, 5e9)}
    assert limits(speedup=2) == {"latency_ms": (0, 5.0)}
    assert limits(speedup=2, latency_ms=3) == {"latency_ms": (0, 3.0)}
    assert limits(speedup=2, latency_ms=7) == {"latency_ms": (0, 5.0)}
    assert share_of(limits(memory_bytes=SOURCE["memory_bytes"] / 4, speedup=2), SOURCE) == 0.25
    assert share_of(limits(params=4e9), SOURCE) == pytest.approx(4e9 / SOURCE["parameters"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "expected a target"),
        ({"parameters": 1e12, "speedup": None}, "keeps every bound, and nothing has to be cut: parameters 8.03"),
        ({"params": 4e9, "parameters": 3e9}, "asks for 3,800,000,000 parameters or more, and plan.budget.parameters"),
        ({"params": 4e9, "weight_bytes": 7e9}, "mean weight_bytes of 7,600,000,000 or more, and plan.budget.weight_b"),
        ({"params": 4e9, "memory_bytes": 7e9}, "mean memory_bytes of 7,600,000,000"),
        ({"params": 5e9, "measure": "active", "parameters": 4e9}, "mean parameters of 4,750,000,000 or more"),
        ({"params": 1e5, "measure": "kv_bytes_per_token", "memory_bytes": 1e8}, "mean memory_bytes of 190,000,000"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_measured(keys, said):
    with pytest.raises(ValueError, match=r"^plan\.budget") as told:
        limits(**keys)
    assert said in str(told.value) and "\n" not in str(told.value)


def test_any_of_the_keys_asks_for_a_search():
    assert asks_for_search(BudgetConfig()) is None
    assert asks_for_search(BudgetConfig(candidates=3, dtype="int4")) is None
    for key in ("params", "memory_bytes", "latency_ms", "speedup", "active"):
        assert asks_for_search(BudgetConfig(**{key: 5.0})) == key
