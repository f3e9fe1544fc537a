"""All sizes of a search at once are those that a search one by one finds, and cost what they cost there."""

import time

import numpy as np
import pytest

from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.pruning.size_search import candidates, default_choices
from nemo_minitron.pruning.size_space import Terms, front, size_space, source_costs, within
from tests.pruning.test_size_search import LLAMA, MODELS, of

COSTS = ("parameters", "non_embedding", "active", "flops_per_token", "kv_bytes_per_token")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_sizes_and_costs_are_those_found_one_by_one(name):
    model = of(MODELS[name])
    choices = default_choices(model, 0.5)
    expected = {
        tuple(sorted(one.sizes.items())): tuple(getattr(one.size, cost) for cost in COSTS)
        for one in candidates(model, choices, 0, 10**18)
    }
    space = size_space(model, choices, Terms())
    assert len(space) == len(expected)
    found = {
        tuple(sorted(space.at(i).items())): tuple(int(space.cost(i)[cost]) for cost in COSTS)
        for i in range(len(space))
    }
    assert found == expected


def test_ratios_and_the_familys_rules_hold_as_one_by_one():
    model = of(LLAMA)
    choices = {
        "expansion": [0.7501, 2, 3.5, 4],
        "hidden": [3000, 3072, 4096],
        "heads": [20, 24, 32],
        "layers": [8, 32],
    }
    expected = {tuple(sorted(one.sizes.items())) for one in candidates(model, choices, 0, 10**18)}
    space = size_space(model, choices, Terms())
    assert {tuple(sorted(space.at(i).items())) for i in range(len(space))} == expected
    with pytest.raises(
        ValueError, match="expected sizes that fit each other, found none; the last: llama needs"
    ):
        size_space(model, {"hidden": [3001]}, Terms())


def test_bytes_of_weights_and_cache_are_counted_at_their_dtypes():
    model = of(LLAMA)
    costs = source_costs(model, Terms("int4", "int8", batch=4, context=32768))
    plain = source_costs(model, Terms("float32", "float32", batch=1, context=1))
    assert costs["weight_bytes"] == costs["parameters"] / 2
    assert plain["weight_bytes"] == 4 * plain["parameters"]
    assert costs["kv_bytes_per_token"] == 32 * 2 * 8 * 128
    assert plain["kv_bytes_per_token"] == 4 * costs["kv_bytes_per_token"]
    assert costs["memory_bytes"] == costs["weight_bytes"] + 4 * 32768 * costs["kv_bytes_per_token"]


def test_a_million_sizes_take_seconds():
    model = of(LLAMA)
    choices = {
        "hidden": range(1024, 4097, 128), "ffn": range(2048, 14337, 128), "heads": range(8, 33, 4),
        "kv_heads": [2, 4, 8], "layers": range(1, 33),
    }  # fmt: skip
    start = time.process_time()
    space = size_space(model, choices, Terms())
    inside = within(space, {"parameters": (0, 4e9), "memory_bytes": (0, 9e9)}, "search")
    best = front(space, inside)
    assert time.process_time() - start < 20  # two or three on a machine that is not busy
    assert len(space) > 500_000
    assert 0 < len(best) < len(inside) < len(space)
    assert (space.costs["parameters"][inside] <= 4e9).all()


def test_on_the_front_nothing_can_be_kept_that_is_not():
    model = of(LLAMA)
    choices = {"hidden": [2048, 3072, 4096], "ffn": [7168, 10240, 14336], "layers": [24, 32]}
    space = size_space(model, choices, Terms())
    inside = within(space, {"parameters": (0, 5e9)}, "search")
    best = {tuple(space.at(i).items()) for i in front(space, inside)}
    every = [space.at(i) for i in inside]
    for one in every:
        larger = any(other != one and all(other[a] >= one[a] for a in one) for other in every)
        assert (tuple(one.items()) in best) != larger


def test_where_nothing_keeps_a_budget_the_nearest_is_told():
    space = size_space(of(LLAMA), {"hidden": [2048, 4096], "layers": [16, 32]}, Terms())
    with pytest.raises(
        ValueError,
        match=r"search: expected parameters of at most 1,000, weight_bytes of at most 5; none of 4 sizes keeps that; "
        r"nearest: parameters 2.27023e\+09, .*\(hidden=2048, layers=16\)",
    ):
        within(space, {"parameters": (0, 1000), "weight_bytes": (0, 5)}, "search")
    with pytest.raises(
        ValueError,
        match=r"expected parameters of 1e\+13 to 2e\+13; none of 4 sizes keeps that; nearest: .*hidden=4096, layers=32",
    ):
        within(space, {"parameters": (1e13, 2e13)}, "search")


def test_layers_that_stay_are_those_of_the_plan():
    hybrid = of(MODELS["hybrid"])
    last = lambda count: range(hybrid.sizes["layers"] - count, hybrid.sizes["layers"])  # noqa: E731
    first = size_space(hybrid, {"layers": [20, 30]}, Terms())
    other = size_space(hybrid, {"layers": [20, 30]}, Terms(), last)
    assert other.kept[20] == tuple(last(20))
    assert np.any(first.costs["parameters"] != other.costs["parameters"])

    def refuses(count):
        if count == 20:
            raise ValueError("not measured")
        return range(count)

    assert len(size_space(hybrid, {"layers": [20, 30]}, Terms(), refuses)) == 1
    targets = complete_targets(hybrid.family, hybrid.sizes, {"heads": 16})
    assert size_space(hybrid, {"heads": [16]}, Terms()).at(0)["heads"] == targets["heads"]
