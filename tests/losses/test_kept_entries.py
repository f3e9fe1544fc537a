"""A teacher over the entries that its student has, against the textbook's formulas in float64."""

import pytest
import torch

from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.kept_entries import KeptEntries, fits, read_by_teacher, shared
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.sparse_targets import known_entries

TOKENS, HIDDEN, ENTRIES = 11, 6, 20
KEPT = torch.tensor([0, 2, 3, 7, 8, 12, 13, 19])


def drawn(entries, seed, cap=None):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    return Projection(
        hidden, torch.randn(entries, HIDDEN, generator=draw, dtype=torch.float64), cap
    )


def logits(model):
    raw = model.hidden_TH @ model.head_VH.T
    return raw if model.softcap is None else model.softcap * torch.tanh(raw / model.softcap)


def by_hand(teacher, student, tau, outside):
    whole = torch.softmax(logits(teacher) / tau, -1)
    mass = whole[:, KEPT].sum(-1)
    p = whole[:, KEPT] / mass[:, None]
    log_q = torch.log_softmax(logits(student) / tau, -1)
    kl = (p * (p.log() - log_q)).sum(-1) * tau**2
    return kl * mass if outside == "tail" else kl


@pytest.mark.parametrize("outside", ["renormalise", "tail"])
@pytest.mark.parametrize(("tau", "cap", "chunk"), [(1.0, None, None), (2.0, 4.0, 3)])
def test_loss_and_gradient_are_those_of_the_distribution_over_kept_entries(
    outside, tau, cap, chunk
):
    teacher, student = drawn(ENTRIES, 0, cap), drawn(len(KEPT), 1)
    labels = torch.tensor([-1, *range(7), 0, -1, 2])
    student.head_VH.requires_grad_()
    taught = shared(KeptEntries(KEPT, outside), teacher, tau)
    weights = LossWeights(1.0, 0.0, Divergence("forward_kl", tau))
    found = fused_linear_loss(student, labels, weights, taught, chunk_tokens=chunk)
    found.loss.backward()
    gradient, student.head_VH.grad = student.head_VH.grad.clone(), None
    expected = by_hand(teacher, student, tau, outside)[labels >= 0].mean()
    expected.backward()
    assert found.divergence.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, student.head_VH.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["top_k", "sampling"])
def test_kept_logits_count_by_the_mass_that_they_had(method):
    teacher, student = drawn(ENTRIES, 0), drawn(len(KEPT), 1)
    labels, weights = torch.zeros(TOKENS, dtype=torch.int64), LossWeights()
    losses = {}
    for outside in ("renormalise", "tail"):
        taught = shared(KeptEntries(KEPT, outside), teacher)
        draw = torch.Generator().manual_seed(0)
        known = known_entries(taught.logits(), method, len(KEPT), 1.0, draw)
        known = type(known)(known.ids_TK, known.log_p_TK, known.log_tail_T, taught.mass_T)
        losses[outside] = fused_linear_loss(student, labels, weights, known).divergence.item()
    if method == "top_k":  # all of them: as beside the student
        for outside, value in losses.items():
            assert value == pytest.approx(
                by_hand(teacher, student, 1.0, outside).mean().item(), rel=1e-6
            )
    assert 0 < losses["tail"] < losses["renormalise"]


def test_nothing_changes_where_nothing_was_removed():
    teacher, student = drawn(ENTRIES, 0), drawn(ENTRIES, 1)
    labels = torch.arange(TOKENS)
    plain = fused_linear_loss(student, labels, LossWeights(), teacher)
    every = shared(KeptEntries(torch.arange(ENTRIES)), teacher)
    assert torch.equal(fused_linear_loss(student, labels, LossWeights(), every).loss, plain.loss)
    tail = shared(KeptEntries(torch.arange(ENTRIES), "tail"), teacher)
    assert torch.equal(tail.mass_T, torch.ones(TOKENS))


def test_the_teacher_reads_its_own_ids_and_vocabularies_that_do_not_fit_are_seen():
    kept = KeptEntries(KEPT)
    assert read_by_teacher(kept, torch.tensor([[1, 7], [0, 3]])).tolist() == [[2, 19], [0, 7]]
    assert read_by_teacher(None, labels := torch.tensor([3])) is labels
    assert (
        fits(kept, len(KEPT), ENTRIES)
        and not fits(kept, len(KEPT), 19)
        and not fits(kept, 9, ENTRIES)
    )
    with pytest.raises(
        ValueError, match="outside: expected one of renormalise, tail, found 'none'"
    ):
        KeptEntries(KEPT, "none")
