"""Intermediate losses against the formulas of [P1] and MiniLMv2, written naively in float64."""

import math

import pytest
import torch

from nemo_minitron.losses.intermediate import (
    IntermediateWeights,
    balance,
    relation_divergence,
    state_distance,
)


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_state(teacher, student, distance):
    rows = []
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        if distance == "mse":
            rows.append(sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / len(t))
        else:
            dot = sum(a * b for a, b in zip(t, s, strict=True))
            rows.append(1 - dot / math.sqrt(sum(a * a for a in t) * sum(b * b for b in s)))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_states_follow_the_formula_and_its_gradient(distance):
    teacher, student = double(5, 8), double(5, 8, seed=1).requires_grad_()
    result = state_distance(teacher, student, distance)
    assert result.shape == (5,)
    assert torch.allclose(result, naive_state(teacher, student.detach(), distance), atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: state_distance(teacher, s, distance), [student])


def test_low_precision_states_are_compared_in_float32():
    assert (
        state_distance(double(3, 4).bfloat16(), double(3, 4, seed=1).bfloat16()).dtype
        == torch.float32
    )


def naive_relation(teacher, student, heads):
    """KL of the relations of one sample, position by position."""

    def distribution(x, head, position):
        size = x.shape[1] // heads
        part = x[:, head * size : (head + 1) * size]
        dots = [
            float(part[position] @ part[other]) / math.sqrt(size) for other in range(position + 1)
        ]
        top = max(dots)
        total = sum(math.exp(d - top) for d in dots)
        return [math.exp(d - top) / total for d in dots]

    rows = []
    for position in range(len(teacher)):
        total = 0.0
        for head in range(heads):
            p, q = (distribution(x, head, position) for x in (teacher, student))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        rows.append(total / heads)
    return torch.tensor(rows, dtype=torch.float64)


def test_relations_follow_the_formula_and_its_gradient_at_unequal_widths():
    teacher, student = double(2, 5, 12), double(2, 5, 8, seed=1).requires_grad_()
    result = relation_divergence(teacher, student, 4)
    expected = torch.stack(
        [naive_relation(t, s, 4) for t, s in zip(teacher, student.detach(), strict=True)]
    )
    assert torch.allclose(result, expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: relation_divergence(teacher, s, 4), [student])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_autocast_takes_no_digits_of_relations(states, low):
    teacher = double(2, 16, 64).to(states)
    student = (teacher.double() + 0.02 * double(2, 16, 64, seed=1)).to(states)
    found = []
    for mixed in (False, True):
        x = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=low, enabled=mixed):
            value = relation_divergence(teacher, x, 4)
        value.sum().backward()  # where relations are made again
        assert value.dtype == torch.float32
        found.append((value, x.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_position_has_no_relation_to_later_ones():
    teacher, student = double(1, 6, 8), double(1, 6, 8, seed=1)
    changed = student.clone()
    changed[:, 4:] += 1
    whole, other = (relation_divergence(teacher, x, 2) for x in (student, changed))
    assert torch.equal(whole[:, :4], other[:, :4])
    assert not torch.allclose(whole[:, 4:], other[:, 4:])


def test_the_same_states_have_no_distance():
    x = double(2, 5, 8)
    assert relation_divergence(x, x, 2).abs().max() < 1e-14
    assert state_distance(x[0], 3 * x[0]).abs().max() < 1e-14


def test_alpha_makes_both_parts_equal_and_carries_no_gradient():
    logits, inside = torch.tensor(3.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    alpha = balance(logits, inside)
    assert float(alpha) == 6.0 and not alpha.requires_grad
    assert torch.isfinite(balance(logits, torch.tensor(0.0)))  # states that are the same already


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": ("hiden",)}, "expected some of embedding, hidden, mlp_input, attention"),
        ({"terms": ("hidden",), "distance": "l1"}, "distance: expected one of cosine, mse"),
        ({"terms": ("hidden",), "layers": ()}, "layers"),
        ({"terms": ("hidden",), "alpha": -1.0}, "alpha"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntermediateWeights(**arguments)


def test_relation_heads_must_divide_the_widths():
    with pytest.raises(ValueError, match="5 does not divide the teacher's 12 channels"):
        relation_divergence(double(1, 3, 12), double(1, 3, 10), 5)
