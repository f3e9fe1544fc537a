"""Values and gradients by hand of every divergence, against autograd of the textbook formulas in float64."""

import pytest
import torch

from nemo_minitron.losses.divergences import DIVERGENCES, Divergence
from nemo_minitron.losses.gradients import value_and_gradient
from nemo_minitron.losses.loss_terms import ByHand, LossWeights
from nemo_minitron.losses.projection import Logits
from nemo_minitron.losses.sparse_targets import SparseTargets, known_entries, sparse_divergence

ENTRIES = 40


def logits(spread=1.5, tokens=9, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    pair = spread * torch.randn(2, tokens, ENTRIES, generator=draw, dtype=torch.float64)
    return [each.to(dtype) for each in pair]


def by_autograd(divergence, teacher, student_NV):
    """What the textbook formula gives: value [tokens] and gradient."""
    leaf_NV = student_NV.double().requires_grad_()
    if isinstance(teacher, SparseTargets):
        value_N = sparse_divergence(teacher, leaf_NV, divergence.temperature)
    else:
        value_N = divergence(teacher.double(), leaf_NV)
    return value_N.detach(), torch.autograd.grad(value_N.sum(), leaf_NV)[0]


def teachers(divergence, teacher_NV):
    """A teacher's logits, and what may be known of them."""
    draw, tau = torch.Generator().manual_seed(1), divergence.temperature
    yield teacher_NV
    if divergence.name == "forward_kl":
        for entries in (1, 7, ENTRIES):
            yield known_entries(teacher_NV, "top_k", entries, tau)
        yield known_entries(teacher_NV, "sampling", 60, tau, draw)  # some of them twice


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients_are_those_of_autograd(name, tau):
    divergence = Divergence(name, tau, beta=0.3, top_k=7)
    teacher_NV, student_NV = logits()
    for teacher in teachers(divergence, teacher_NV):
        before_NV = student_NV.clone()
        found = value_and_gradient(divergence, teacher, student_NV)
        value_N, grad_NV = by_autograd(divergence, teacher, student_NV)
        torch.testing.assert_close(found.value_N1[:, 0], value_N, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.grad_NV, grad_NV, rtol=1e-10, atol=1e-12)
        assert torch.equal(student_NV, before_NV) and grad_NV.abs().max() > 1e-3
        if found.log_sum_N1 is not None:
            shifted_NV = student_NV - student_NV.amax(-1, keepdim=True)
            torch.testing.assert_close(found.log_sum_N1[:, 0], (shifted_NV / tau).logsumexp(-1))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_distributions_with_nothing_in_common_have_numbers(name):
    """In float32 most probabilities here round to 0; the tail of the student, too."""
    divergence = Divergence(name, beta=0.3, top_k=3)
    teacher_NV, student_NV = logits(spread=60, dtype=torch.float32)
    for teacher in teachers(divergence, teacher_NV):
        found = value_and_gradient(divergence, teacher, student_NV)
        exact = known(teacher)
        value_N, grad_NV = by_autograd(divergence, exact, student_NV)
        torch.testing.assert_close(found.value_N1[:, 0].double(), value_N, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.grad_NV.double(), grad_NV, rtol=1e-4, atol=2e-5)


def known(teacher):
    """The same in float64."""
    if not isinstance(teacher, SparseTargets):
        return teacher.double()
    parts = (teacher.log_p_TK, teacher.log_tail_T)
    return SparseTargets(teacher.ids_TK, *(None if p is None else p.double() for p in parts))


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_do_not_diverge_and_learn_nothing(name, tau):
    """To the bit where distributions are compared: a student whose vocabulary alone was cut begins so."""
    divergence = Divergence(name, tau, top_k=7)
    _, student_NV = logits(spread=5, dtype=torch.float32)
    for teacher in list(teachers(divergence, student_NV.clone()))[:4]:  # not the drawn ones
        found = value_and_gradient(divergence, teacher, student_NV)
        least = 1e-6 if name in ("jsd", "cosine") else 0
        assert found.value_N1.abs().max() <= least and found.grad_NV.abs().max() <= least


@pytest.mark.parametrize("name", ["jsd", "mse"])
def test_large_logits_do_not_cost_the_cross_entropy_its_digits(name):
    student_NV = logits(dtype=torch.float32)[1] + 1000
    exact_NV = student_NV.double().requires_grad_()
    labels_N = torch.arange(9)
    exact = torch.nn.functional.cross_entropy(exact_NV, labels_N, reduction="sum")
    (grad_NV,) = torch.autograd.grad(exact, exact_NV)
    weights = LossWeights(1e-30, 1.0, Divergence(name))
    found = ByHand(weights)(Logits(student_NV.clone()), Logits(student_NV), labels_N, True)
    assert float(found.sums[1]) == pytest.approx(exact.item(), rel=1e-6)
    assert (found.grad_CV - grad_NV).norm() < 3e-7 * grad_NV.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_a_gradient_the_values_are_the_same(name):
    weights, labels_N = LossWeights(0.7, 0.3, Divergence(name, 2.0, top_k=7)), torch.arange(9)
    found = []
    for wants in (True, False):
        teacher_NV, student_NV = logits()
        found.append(ByHand(weights)(Logits(student_NV), Logits(teacher_NV), labels_N, wants))
    torch.testing.assert_close(found[1].sums, found[0].sums)
    assert found[1].grad_CV is None and found[0].grad_CV.any()


def test_a_student_whose_logits_are_all_zero_has_an_angle_as_torch_has_it():
    teacher_NV, student_NV = logits()
    student_NV[0], teacher_NV[1] = 0, 0
    divergence = Divergence("cosine")
    found = value_and_gradient(divergence, teacher_NV, student_NV)
    value_N, grad_NV = by_autograd(divergence, teacher_NV, student_NV)
    torch.testing.assert_close(found.value_N1[:, 0], value_N)
    torch.testing.assert_close(found.grad_NV, grad_NV)


def term(weights, teacher, labels_N, mass_N=None, **how):
    teacher_NV, student_NV = logits()
    if teacher == "logits":
        teacher = Logits(teacher_NV, mass_T=mass_N)
    else:
        entries = known_entries(teacher_NV, teacher, 5, weights.divergence.temperature,
                                torch.Generator().manual_seed(0))  # fmt: skip
        teacher = SparseTargets(entries.ids_TK, entries.log_p_TK, entries.log_tail_T, mass_N)
    return ByHand(weights, **how)(Logits(student_NV), teacher, labels_N, True)


@pytest.mark.parametrize("ce", [0.0, 0.4])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("teacher", ["logits", "top_k", "sampling"])
def test_a_token_counts_by_its_share_of_the_teachers_mass_and_not_where_it_has_no_label(
    teacher, tau, ce
):
    """Cross-entropy counts whole; a label below 0 takes both away."""
    weights = LossWeights(0.7, ce, Divergence(temperature=tau))
    teacher_NV, student_NV = logits()
    labels_N = torch.arange(9) % 4 - 1
    mass_N = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    found = term(weights, teacher, labels_N, mass_N, skips=True)
    leaf_NV = student_NV.clone().requires_grad_()
    exact = teacher_NV
    if teacher != "logits":
        exact = known_entries(teacher_NV, teacher, 5, tau, torch.Generator().manual_seed(0))
        each_N = sparse_divergence(exact, leaf_NV, tau)
    else:
        each_N = weights.divergence(exact, leaf_NV)
    valid_N = labels_N >= 0
    divergence = (each_N * mass_N)[valid_N].sum()
    hard = torch.nn.functional.cross_entropy(leaf_NV[valid_N], labels_N[valid_N], reduction="sum")
    (grad_NV,) = torch.autograd.grad(0.7 * divergence + ce * hard, leaf_NV)
    torch.testing.assert_close(found.sums, torch.stack([divergence, hard]).detach())
    torch.testing.assert_close(found.grad_CV, grad_NV)
    assert not found.grad_CV[~valid_N].any()


@pytest.mark.parametrize(
    ("name", "teacher"), [("jsd", "logits"), ("forward_kl", "top_k"), ("forward_kl", "sampling")]
)
def test_compiled_it_is_the_same(name, teacher):
    """As training on CUDA has it."""
    weights = LossWeights(0.7, 0.4, Divergence(name, temperature=2.0, beta=0.3))
    labels_N = torch.arange(9) % 4 - 1
    mass_N = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    found, expected = (
        term(weights, teacher, labels_N, mass_N, skips=True, compiled=compiled)
        for compiled in (True, False)
    )
    torch.testing.assert_close(found.sums, expected.sums)
    torch.testing.assert_close(found.grad_CV, expected.grad_CV)
