"""Against the formulas of [P1] section 2.2, written out naively in float64."""

import itertools

import pytest
import torch

from nemo_minitron.families import families
from nemo_minitron.pruning.select import group_scores
from nemo_minitron.scoring.depth import cosines
from nemo_minitron.scoring.importance import (
    AGGREGATIONS,
    concentration,
    merge,
    moments,
    over_batch,
    over_routed,
    over_sequence,
    random_scores,
)
from nemo_minitron.scoring.magnitude import unit_squares


def naive(values, how):
    """One aggregation of a list of numbers, by the letter."""
    values = [abs(float(v)) for v in values] if how == "mean" else [float(v) for v in values]
    if how == "l2":
        return sum(v * v for v in values) ** 0.5
    mean = sum(values) / len(values)
    return mean if how == "mean" else sum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(AGGREGATIONS, AGGREGATIONS)))
def test_all_nine_aggregations_with_padding(batch, sequence):
    torch.manual_seed(0)
    x = torch.randn(5, 7, 3)
    mask = torch.rand(5, 7) > 0.3
    mask[:, 0] = True
    expected = [
        naive([naive(x[b, mask[b], u].double(), sequence) for b in range(5)], batch)
        for u in range(3)
    ]
    values = over_sequence(x, mask, AGGREGATIONS)  # several at once, side by side
    assert set(values) == set(AGGREGATIONS)
    found = over_batch(moments(values[sequence]), batch)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sequence", AGGREGATIONS)
def test_padding_takes_no_part_whatever_it_holds(sequence):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    spoiled = x.clone()
    spoiled[:, 4:] = float("nan")
    expected = over_sequence(x[:, :4], None, [sequence])[sequence]
    assert torch.allclose(over_sequence(spoiled, mask, [sequence])[sequence], expected, atol=1e-6)


@pytest.mark.parametrize("sequence", AGGREGATIONS)
def test_tokens_that_did_not_come_to_an_expert_count_as_zeros(sequence):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 2)
    came = torch.rand(3, 5) > 0.5
    token = came.flatten().nonzero().flatten()
    dense = torch.where(came[..., None], x, 0.0)
    expected = over_sequence(dense, None, [sequence])[sequence]
    found = over_routed(x.flatten(0, 1)[token], token // 5, torch.full((3,), 5), [sequence])[
        sequence
    ]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("batch", AGGREGATIONS)
def test_any_split_of_the_samples_merges_to_the_whole(batch):
    torch.manual_seed(0)
    per_sample = torch.rand(64, 9)
    whole = over_batch(moments(per_sample), batch)
    for sizes in ([1, 63], [10, 20, 34], [16] * 4, [1] * 64):
        parts = [moments(part) for part in per_sample.split(sizes)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merge(merged, part)
        assert merged.samples == 64
        assert torch.allclose(over_batch(merged, batch), whole, rtol=1e-12)


def test_half_precision_activations_accumulate_in_float32():
    x = torch.full((1, 4096, 1), 0.01, dtype=torch.bfloat16)
    assert over_sequence(x, None, ["mean"])["mean"].item() == pytest.approx(
        float(x[0, 0, 0]), rel=1e-5
    )


def test_a_group_is_the_norm_of_its_heads():
    assert group_scores(torch.tensor([[3.0, 4.0, 0.0, 2.0]]), 2).tolist() == [[5.0, 2.0]]


def test_block_influence_is_zero_for_an_identity():
    x = torch.randn(2, 4, 8)
    found = cosines(x, torch.cat([x[:1], -x[1:]]))
    assert torch.allclose(found, torch.tensor([[1.0] * 4, [-1.0] * 4]), atol=1e-6)


def test_magnitude_of_a_unit_is_the_norm_of_its_weights():
    family = families()["llama"]
    sizes = {
        "hidden": 5,
        "heads": 3,
        "head_dim": 2,
        "kv_heads": 3,
        "ffn": 4,
        "vocab": 7,
        "layers": 1,
    }
    row = next(row for row in family.rows if row.pattern.endswith("q_proj.weight"))
    weight = torch.randn(6, 5)
    found = unit_squares(weight, row, sizes, family, {"layer": 0})
    assert set(found) == {"heads", "hidden", "layers"}
    assert torch.allclose(found["heads"], weight.double().square().view(3, -1).sum(1))
    assert torch.allclose(found["hidden"], weight.double().square().sum(0))
    assert float(found["layers"]) == pytest.approx(float(weight.double().square().sum()))


def test_magnitude_of_fused_and_concatenated_tensors(monkeypatch):
    from nemo_minitron.scoring import magnitude

    monkeypatch.setattr(magnitude, "_BLOCK", 40)  # several blocks
    family = families()["gpt_oss"]
    sizes = {"experts": 3, "hidden": 4, "expert_ffn": 5}
    row = next(row for row in family.rows if row.pattern.endswith("gate_up_proj"))
    weight = torch.randn(3, 4, 10)
    found = unit_squares(weight, row, sizes, family, {})
    squares = weight.double().square()
    assert torch.allclose(found["expert_ffn"], squares.view(3, 4, 5, 2).sum((1, 3)))
    assert torch.allclose(found["experts"], squares.sum((1, 2)))
    assert torch.allclose(found["hidden"], squares.sum((0, 2)))
    family = families()["phi3"]
    row = next(row for row in family.rows if row.pattern.endswith("qkv_proj.weight"))
    weight = torch.randn(16, 3)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 2, "hidden": 3}
    found = unit_squares(weight, row, sizes, family, {})
    squares = weight.double().square().sum(1)
    assert torch.allclose(found["heads"], squares[:8].view(4, 2).sum(1))
    assert torch.allclose(found["kv_heads"], squares[8:].view(2, 2, 2).sum((0, 2)))


def test_random_scores_repeat_by_seed_only():
    assert torch.equal(random_scores((3, 4), 5), random_scores((3, 4), 5))
    assert not torch.equal(random_scores((3, 4), 5), random_scores((3, 4), 6))


def test_concentration_is_the_gini_coefficient():
    assert concentration(torch.ones(10)) == pytest.approx(0)
    one = torch.zeros(10)
    one[3] = 1
    assert concentration(one) == pytest.approx(0.9)
    assert concentration(torch.zeros(4)) == 0
