"""Divergence from a few known entries per token, against naive formulas in float64 and against the whole."""

import math

import pytest
import torch

from nemo_minitron.losses.divergences import Divergence, forward_kl, topk_kl
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.sparse_targets import SparseTargets, known_entries, sparse_divergence


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_a_bucket(teacher_TV, student_TV, entries, tau):
    """KL over the teacher's largest entries and one bucket for the others, x tau^2, by the letter."""
    values = []
    for t, s in zip(teacher_TV, student_TV, strict=True):
        p, q = torch.softmax(t / tau, -1), torch.softmax(s / tau, -1)
        order = sorted(range(len(p)), key=lambda i: -float(p[i]))
        groups = [[i] for i in order[:entries]] + ([order[entries:]] if entries < len(p) else [])
        masses = [(p[group].sum(), q[group].sum()) for group in groups]
        values.append(sum(a * (a / b).log() for a, b in masses) * tau**2)
    return torch.stack(values)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("entries", [1, 4, 10, 11, 99])
def test_the_largest_entries_and_a_bucket_follow_the_formula(entries, tau):
    teacher_TV, student_TV = 2 * double(6, 11), double(6, 11, seed=1).requires_grad_()
    expected = with_a_bucket(teacher_TV, student_TV, entries, tau)
    targets = known_entries(teacher_TV, "top_k", entries, tau)
    assert targets.ids_TK.shape == (6, min(entries, 11)) and targets.log_p_TK.dtype == torch.float64
    for found in (
        sparse_divergence(targets, student_TV, tau),
        topk_kl(teacher_TV, student_TV, entries, tau),
    ):
        assert torch.allclose(found, expected, atol=1e-12)
        (grad_TV,) = torch.autograd.grad(found.sum(), student_TV)
        (exact_TV,) = torch.autograd.grad(expected.sum(), student_TV, retain_graph=True)
        assert torch.allclose(grad_TV, exact_TV, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: sparse_divergence(targets, s, tau), [student_TV])
    low = known_entries(teacher_TV.float(), "top_k", entries, tau)
    assert torch.equal(low.ids_TK, targets.ids_TK)
    assert torch.allclose(low.log_p_TK.double(), targets.log_p_TK, atol=1e-5)


def test_all_entries_give_the_whole_divergence():
    teacher_TV, student_TV = double(3, 7), double(3, 7, seed=1)
    targets = known_entries(teacher_TV, "top_k", 99, 1.0)
    assert torch.allclose(
        sparse_divergence(targets, student_TV), forward_kl(teacher_TV, student_TV), atol=1e-5
    )


def test_drawn_entries_follow_the_formula():
    ids_TK = torch.tensor([[2, 2, 0], [1, 4, 3]])
    student_TV = double(2, 5).requires_grad_()
    rows = []
    for ids, logits in zip(ids_TK.tolist(), student_TV.tolist(), strict=True):
        total = sum(math.exp(x / 2) for x in logits)
        rows.append(-4 * sum(logits[i] / 2 - math.log(total) for i in ids) / 3)
    found = sparse_divergence(SparseTargets(ids_TK), student_TV, 2.0)
    assert torch.allclose(found, torch.tensor(rows, dtype=torch.float64), atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: sparse_divergence(SparseTargets(ids_TK), s, 2.0), [student_TV]
    )


def test_the_gradient_from_drawn_entries_is_unbiased_and_that_from_the_largest_is_not():
    teacher_TV, student_TV = 1.5 * double(1, 8), double(1, 8, seed=1).requires_grad_()
    (exact_TV,) = torch.autograd.grad(forward_kl(teacher_TV, student_TV).sum(), student_TV)
    many = teacher_TV.expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    targets = known_entries(many, "sampling", 4, 1.0, generator)
    repeated = student_TV.expand(20000, -1)
    (drawn_TV,) = torch.autograd.grad(sparse_divergence(targets, repeated).mean(), student_TV)
    assert (drawn_TV - exact_TV).abs().max() < 0.01
    top = known_entries(teacher_TV, "top_k", 2, 1.0)
    (top_TV,) = torch.autograd.grad(sparse_divergence(top, student_TV).sum(), student_TV)
    assert (top_TV - exact_TV).abs().max() > 0.02


@pytest.mark.parametrize("method", ["top_k", "sampling"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_fused_with_the_projection_it_is_the_same(method, chunk):
    teacher_TV, hidden_TH, head_VH = double(7, 9), double(7, 5, seed=1), double(9, 5, seed=2)
    labels_T = torch.tensor([1, 2, -1, 3, 4, -1, 8])
    targets = known_entries(teacher_TV, method, 3, 2.0, torch.Generator().manual_seed(0))
    leaves = [
        (hidden_TH.clone().requires_grad_(), head_VH.clone().requires_grad_()) for _ in range(2)
    ]
    weights = LossWeights(0.7, 0.3, Divergence(temperature=2.0))
    terms = fused_linear_loss(
        Projection(*leaves[0], 30.0), labels_T, weights, targets, chunk_tokens=chunk
    )
    logits_TV = leaves[1][0] @ leaves[1][1].T
    logits_TV = 30 * torch.tanh(logits_TV / 30)
    valid_T = labels_T >= 0
    divergence = sparse_divergence(targets, logits_TV, 2.0)[valid_T].mean()
    ce = torch.nn.functional.cross_entropy(logits_TV[valid_T], labels_T[valid_T])
    naive = 0.7 * divergence + 0.3 * ce
    assert torch.allclose(terms.loss.double(), naive, atol=1e-5)
    assert torch.allclose(terms.divergence.double(), divergence, atol=1e-5)
    terms.loss.backward()
    naive.backward()
    for one, other in zip(leaves[0], leaves[1], strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)
