"""Sizes between the rounds of iterative importance."""

import pytest

from nemo_minitron.families import Family, check_sizes, families
from nemo_minitron.scoring.iterative import sizes_after

LLAMA = {
    "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 128256, "layers": 32,
}  # fmt: skip


def rounds_of(
    family: Family, source: dict[str, int], target: dict[str, int], rounds: int
) -> list[dict[str, int]]:
    """The sizes after each round."""
    return [sizes_after(family, source, target, round_, rounds) for round_ in range(rounds)]


@pytest.mark.parametrize(
    ("model_type", "rounds", "hidden", "ffn"),
    [
        ("llama", 2, [3584, 3072], [11776, 9216]),
        ("llama", 4, [3840, 3584, 3328, 3072], [13056, 11776, 10496, 9216]),
        # 3754.7, 3413.3; 12629.3, 10922.7; the hidden size of a Llama is a multiple of its 32 heads
        ("llama", 3, [3776, 3424, 3072], [12630, 10923, 9216]),
        ("nemotron", 3, [3755, 3414, 3072], [12630, 10923, 9216]),
    ],
)
def test_every_round_cuts_a_part_of_the_way(model_type, rounds, hidden, ffn):
    target = {**LLAMA, "hidden": 3072, "ffn": 9216, "layers": 16}
    sizes = rounds_of(families()[model_type], LLAMA, target, rounds)
    assert sizes == [
        {**LLAMA, "hidden": width, "ffn": neurons}
        for width, neurons in zip(hidden, ffn, strict=True)
    ]


def test_heads_stay_as_many_in_every_group():
    source = {**LLAMA, "hidden": 64, "ffn": 41, "heads": 8, "kv_heads": 4}
    target = {**source, "hidden": 48, "ffn": 30, "heads": 4}
    sizes = rounds_of(families()["nemotron"], source, target, 4)
    assert [found["hidden"] for found in sizes] == [60, 56, 52, 48]
    assert [found["ffn"] for found in sizes] == [39, 36, 33, 30]
    assert [found["heads"] for found in sizes] == [8, 8, 8, 4]  # in 4 groups


@pytest.mark.parametrize("rounds", [2, 3, 5, 40])
def test_sizes_that_depend_on_each_other_stay_valid_and_near_the_line(rounds):
    family = families()["granitemoehybrid"]
    source = {
        **dict.fromkeys(family.axes, 1), "mamba_expand": 2, "hidden": 4096, "mamba_heads": 128,
        "mamba_head_dim": 64, "ffn": 1536, "experts": 64, "expert_ffn": 768, "experts_per_token": 8, "heads": 32,
        "kv_heads": 8, "layers": 40,
    }  # fmt: skip
    target = {
        **source, "hidden": 3072, "mamba_heads": 96, "ffn": 1024, "experts": 48, "expert_ffn": 512, "heads": 24,
        "kv_heads": 6,
    }  # fmt: skip
    before = source
    for number, found in enumerate(rounds_of(family, source, target, rounds), 1):
        check_sizes(family, found, "plan")
        line = 4096 - 1024 * number / rounds
        assert line <= found["hidden"] < line + 32  # 32 channels for a Mamba head
        assert all(target[axis] <= found[axis] <= before[axis] for axis in found)
        before = found
    assert before == target
