"""The loss with the vocabulary split over ranks: threads stand for ranks here, gloo for them in tests/stages."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import nemo_minitron.losses.fused_linear_loss as fused
from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.vocabulary_parallel import VocabularyShard


class Exchange:
    """All-reduce between threads."""

    def __init__(self, ranks):
        self.ranks, self.barrier, self.given = (
            ranks,
            threading.Barrier(ranks, timeout=20),
            [None] * ranks,
        )

    def reduce(self, rank):
        def run(tensor, how):
            self.given[rank] = tensor
            self.barrier.wait()
            stacked = torch.stack([x.detach() for x in self.given])
            self.barrier.wait()
            return stacked.sum(0) if how == "sum" else stacked.amax(0)

        return run


@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights(0.6, 0.4, Divergence(temperature=2.0)), LossWeights(0.0, 1.0)],
)
@pytest.mark.parametrize("caps", [(None, None), (5.0, 9.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_together_have_the_loss_and_gradients_of_one(weights, caps, dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    student_TH, head_VH, teacher_TG, teacher_VG = draw(9, 6), draw(11, 6), draw(9, 4), draw(11, 4)
    labels_T = torch.tensor([0, 3, -1, 10, 4, 5, -1, 7, 2])
    taught = weights.kl != 0
    whole = student_TH.clone().requires_grad_(), head_VH.clone().requires_grad_()
    everything = Projection(teacher_TG, teacher_VG, caps[1]) if taught else None
    expected = fused_linear_loss(Projection(*whole, caps[0]), labels_T, weights, everything)
    expected.loss.backward()
    cuts, exchange = [0, 4, 9, 11], Exchange(3)  # uneven parts

    def rank(number):
        part = slice(cuts[number], cuts[number + 1])
        hidden = student_TH.clone().requires_grad_()
        head = head_VH[part].clone().requires_grad_()
        teacher = Projection(teacher_TG, teacher_VG[part], caps[1]) if taught else None
        shard = VocabularyShard(cuts[number], exchange.reduce(number))
        student = Projection(hidden, head, caps[0])
        terms = fused_linear_loss(student, labels_T, weights, teacher, chunk_tokens=4, shard=shard)
        terms.loss.backward()
        return terms, hidden.grad, head.grad

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(rank, range(3)))
    for terms, grad_TH, _ in found:
        assert torch.allclose(terms.loss, expected.loss, atol=1e-5)
        assert torch.allclose(terms.ce, expected.ce, atol=1e-5)
        assert taught is bool(torch.isfinite(terms.divergence))
        assert torch.allclose(grad_TH, whole[0].grad, atol=1e-5)
    assert torch.allclose(torch.cat([grad for *_, grad in found]), whole[1].grad, atol=1e-5)


def test_ranks_with_unlike_parts_take_the_same_chunks(monkeypatch):
    """Where the budget of memory decides, a rank with fewer rows would take more tokens at a time, and wait for ever."""
    monkeypatch.setattr(fused, "CPU_CHUNK_BYTES", 4 * 5 * 3 * 2)
    monkeypatch.setattr(fused, "LEAST_ROWS", 1)
    monkeypatch.setattr(fused, "CHUNKS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden_TH, head_VH = (
        torch.randn(12, 6, generator=generator),
        torch.randn(11, 6, generator=generator),
    )
    labels_T, weights = torch.arange(12) % 11, LossWeights(0.0, 1.0)
    expected = fused_linear_loss(Projection(hidden_TH, head_VH), labels_T, weights)
    cuts, exchange = [0, 4, 9, 11], Exchange(3)

    def rank(number):
        student = Projection(hidden_TH, head_VH[cuts[number] : cuts[number + 1]])
        shard = VocabularyShard(cuts[number], exchange.reduce(number), 5)
        return fused_linear_loss(student, labels_T, weights, shard=shard)

    with ThreadPoolExecutor(3) as pool:
        for terms in pool.map(rank, range(3)):
            assert torch.allclose(terms.loss, expected.loss, atol=1e-5)


@pytest.mark.parametrize("ce", [0.0, 0.4])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 64, 300])
def test_one_shard_that_is_the_whole_is_the_same_to_rounding(chunk, tau, ce):
    """Both terms go through one sweep: chunks, sums, products and the scaled backward are the same."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    values, pair = (draw(300, 16), draw(1201, 16)), (draw(300, 24), draw(1201, 24))
    labels_T = torch.randint(0, 1201, (300,), generator=generator)
    labels_T[::7] = -1
    found = []
    for shard in (None, VocabularyShard(0, lambda tensor, _: tensor)):
        leaves = [value.clone().requires_grad_() for value in values]
        terms = fused_linear_loss(
            Projection(*leaves, 5.0), labels_T, LossWeights(0.7, ce, Divergence(temperature=tau)),
            Projection(*pair, 9.0), chunk_tokens=chunk, shard=shard,
        )  # fmt: skip
        (3 * terms.loss).backward()
        found.append(
            [terms.loss.detach(), terms.divergence, terms.ce, *(leaf.grad for leaf in leaves)]
        )
    for whole, part in zip(*found, strict=True):
        assert torch.allclose(whole, part, rtol=1e-12, atol=1e-14)


def test_without_gradients_no_gradient_is_exchanged():
    sizes = []
    shard = VocabularyShard(0, lambda tensor, _: sizes.append(tensor.shape) or tensor)
    student, labels_T = Projection(torch.ones(5, 2), torch.eye(3, 2)), torch.tensor([0, 1, 2, 0, 1])
    fused_linear_loss(student, labels_T, LossWeights(0.0, 1.0), shard=shard)
    assert sizes == [(5,), (5,), (2,)]


def test_other_divergences_are_refused():
    shard = VocabularyShard(0, lambda tensor, _: tensor)
    nothing = Projection(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="expected forward_kl, found jsd"):
        fused_linear_loss(
            nothing, torch.zeros(1, dtype=torch.int64), LossWeights(divergence=Divergence("jsd")), nothing,
            shard=shard,
        )  # fmt: skip
