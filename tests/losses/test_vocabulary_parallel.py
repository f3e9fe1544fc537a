"""The loss with the vocabulary split over ranks: threads stand for ranks here, gloo for them in tests/stages."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.vocabulary_parallel import split_linear_loss


class Exchange:
    """All-reduce between threads."""

    def __init__(self, ranks):
        self.ranks, self.barrier, self.given = ranks, threading.Barrier(ranks), [None] * ranks

    def reduce(self, rank):
        def run(tensor, how):
            self.given[rank] = tensor
            self.barrier.wait()
            stacked = torch.stack([x.detach() for x in self.given])
            self.barrier.wait()
            return stacked.sum(0) if how == "sum" else stacked.amax(0)

        return run


@pytest.mark.parametrize(
    "weights", [LossWeights(), LossWeights(0.6, 0.4, Divergence(temperature=2.0)), LossWeights(0.0, 1.0)]
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
    pair = (teacher_TG, teacher_VG) if taught else None
    expected = fused_linear_loss(*whole, labels_T, weights, pair, softcaps=caps)
    expected.loss.backward()
    cuts, exchange = [0, 4, 9, 11], Exchange(3)  # uneven parts

    def rank(number):
        part = slice(cuts[number], cuts[number + 1])
        hidden = student_TH.clone().requires_grad_()
        head = head_VH[part].clone().requires_grad_()
        teacher = (teacher_TG, teacher_VG[part]) if taught else None
        terms = split_linear_loss(
            hidden, head, labels_T, cuts[number], weights, exchange.reduce(number), teacher, caps, 4
        )
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


def test_other_divergences_are_refused():
    with pytest.raises(ValueError, match="expected forward_kl, found jsd"):
        split_linear_loss(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), 0,
            LossWeights(divergence=Divergence("jsd")), lambda x, _: x,
        )  # fmt: skip
