"""The kernels of the loss, run by Triton's interpreter on the CPU, against float64.

``test_kernels.py`` runs this file in a process of its own: Triton decides when it is imported.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_minitron.losses import kernels as module
from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.loss_terms import ByHand
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.vocabulary_parallel import VocabularyShard
from tests.losses.test_vocabulary_parallel import Exchange


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The module, with rows in several parts and a few of them in a group."""
    monkeypatch.setattr(module, "COLUMNS", 32)
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "CACHED_BYTES", 2000)
    return module


def problem(dtype, entries=75, tokens=5):
    draw = torch.Generator().manual_seed(0)
    shapes = ((tokens, 12), (entries, 12), (tokens, 8), (entries, 8))
    values = [
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes
    ]
    labels_T = torch.randint(0, entries, (tokens,), generator=draw)
    labels_T[::5] = -100
    return values, labels_T


def run(values, labels_T, weights, caps, mass_T=None, **more):
    student_TH, head_VH = (value.clone().requires_grad_() for value in values[:2])
    teacher = Projection(*values[2:], caps[1], mass_T) if weights.kl else None
    found = fused_linear_loss(
        Projection(student_TH, head_VH, caps[0]), labels_T, weights, teacher, **more
    )
    found.loss.backward()
    return found, student_TH.grad, head_VH.grad


MIXES = [
    LossWeights(),
    LossWeights(0.0, 1.0),
    LossWeights(0.7, 0.3),
    LossWeights(0.7, 0.3, Divergence(temperature=2.5)),
]


# the interpreter takes a second for each: every pair of a mix and a cap, of a mix and a size, of a cap and a size
CAPS, SIZES = ((None, None), (4.0, 6.0)), (75, 64, 7)
PAIRS = [
    (weights, CAPS[(i + j) % 2], entries)
    for i, weights in enumerate(MIXES)
    for j, entries in enumerate(SIZES)
]


@pytest.mark.parametrize(("weights", "caps", "entries"), PAIRS)
def test_values_and_gradients_against_float64(kernels, weights, caps, entries):
    values, labels_T = problem(torch.float32, entries)
    expected = run([value.double() for value in values], labels_T, weights, caps)
    found = run(values, labels_T, weights, caps, chunk_tokens=3)
    assert float(found[0].ce) == pytest.approx(float(expected[0].ce), rel=1e-5)
    if weights.kl:
        assert float(found[0].divergence) == pytest.approx(float(expected[0].divergence), rel=1e-5)
    assert float(found[0].loss) == pytest.approx(float(expected[0].loss), rel=1e-5)
    for ours, exact in zip(found[1:], expected[1:], strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("weights", MIXES[2:])
def test_a_token_whose_teacher_has_lost_mass_counts_by_its_share(kernels, monkeypatch, weights):
    """As with a vocabulary that was cut: the teacher's entries outside of it do not count."""
    values, labels_T = problem(torch.float32)
    share_T = torch.rand(len(labels_T), generator=torch.Generator().manual_seed(1)).double()
    expected = run([v.double() for v in values], labels_T, weights, (4.0, None), mass_T=share_T)
    monkeypatch.setattr(ByHand, "evaluate", None)  # the kernel's own number
    found = run(values, labels_T, weights, (4.0, None), mass_T=share_T.float(), chunk_tokens=3)
    whole = run(values, labels_T, weights, (4.0, None))
    assert float(whole[0].divergence) > 1.2 * float(found[0].divergence)
    assert float(found[0].divergence) == pytest.approx(float(expected[0].divergence), rel=1e-5)
    assert float(found[0].ce) == pytest.approx(float(expected[0].ce), rel=1e-5)
    for ours, exact in zip(found[1:], expected[1:], strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 1e-6


def test_it_is_the_kernel_that_runs(kernels, monkeypatch):
    launched = []
    original = kernels.Chunk._launch
    monkeypatch.setattr(
        kernels.Chunk, "_launch", lambda *a, **k: (launched.append(1), original(*a, **k))[1]
    )
    monkeypatch.setattr(ByHand, "evaluate", None)
    run(*problem(torch.bfloat16), LossWeights(), (None, None))
    assert launched


def test_bfloat16_gradients_are_as_good_as_those_of_torch(kernels, monkeypatch):
    """The gradient by the logits is rounded to the products' precision once, in both."""
    values, labels_T = problem(torch.bfloat16, 75, 12)
    weights = LossWeights(0.7, 0.3)
    _, *exact = run([value.double() for value in values], labels_T, weights, (None, None))
    _, *found = run(values, labels_T, weights, (None, None), chunk_tokens=8)
    for ours, right in zip(found, exact, strict=True):
        assert float((ours.double() - right).norm() / right.norm()) < 4e-3


def test_tokens_that_do_not_count_have_no_gradient_and_no_number(kernels):
    values, labels_T = problem(torch.float32)
    values[0][0] = values[2][0] = torch.nan  # of a token that does not count
    found, grad_TH, grad_VH = run(values, labels_T, LossWeights(0.5, 0.5), (None, None))
    assert torch.isfinite(found.loss) and not grad_TH[labels_T < 0].any()
    assert torch.isfinite(grad_TH).all() and torch.isfinite(grad_VH).all() and grad_VH.any()
    none_T = torch.full_like(labels_T, -1)
    found, grad_TH, grad_VH = run(values, none_T, LossWeights(0.5, 0.5), (None, None))
    assert float(found.loss) == 0 and not grad_TH.any() and not grad_VH.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_show(kernels, bad):
    values, labels_T = problem(torch.float32)
    values[1][70, 3] = bad
    assert not torch.isfinite(run(values, labels_T, LossWeights(), (None, None))[0].loss)


@pytest.mark.parametrize(
    ("weights", "caps"), [(weights, CAPS[i % 2]) for i, weights in enumerate(MIXES)]
)
def test_ranks_that_share_a_vocabulary(kernels, weights, caps, monkeypatch):
    lock, original = threading.Lock(), kernels.Chunk._launch

    def one_at_a_time(*arguments, **more):  # the interpreter has one grid in the process
        with lock:
            original(*arguments, **more)

    monkeypatch.setattr(kernels.Chunk, "_launch", one_at_a_time)
    values, labels_T = problem(torch.float32)
    expected = run([value.double() for value in values], labels_T, weights, caps)
    cuts, exchange = [0, 40, 60, 75], Exchange(3)

    def rank(number):
        part, shard = (
            slice(cuts[number], cuts[number + 1]),
            VocabularyShard(cuts[number], exchange.reduce(number)),
        )
        mine = [values[0], values[1][part], values[2], values[3][part]]
        return run(mine, labels_T, weights, caps, chunk_tokens=3, shard=shard)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(rank, range(3)))
    for terms, grad_TH, _ in found:
        assert float(terms.loss) == pytest.approx(float(expected[0].loss), rel=1e-5)
        assert float(terms.ce) == pytest.approx(float(expected[0].ce), rel=1e-5)
        assert float((grad_TH - expected[1]).norm() / expected[1].norm()) < 1e-6
    grad_VH = torch.cat([grad for *_, grad in found])
    assert float((grad_VH - expected[2]).norm() / expected[2].norm()) < 1e-6
