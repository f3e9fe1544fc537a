"""Against the textbook formulas in float64, values and gradients."""

import pytest
import torch
from torch.nn import functional

from nemo_minitron.losses.divergences import DIVERGENCES, Divergence, forward_kl, topk_kl
from nemo_minitron.losses.fused_linear_loss import LossWeights, cross_entropy, fused_linear_loss
from nemo_minitron.losses.loss_terms import ByHand
from nemo_minitron.losses.projection import Logits, Projection

TOKENS, VOCABULARY, HIDDEN, TEACHER = 37, 101, 16, 24


def parts(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    student = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    head = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    teacher = (
        torch.randn(TOKENS, TEACHER, dtype=dtype),
        torch.randn(VOCABULARY, TEACHER, dtype=dtype),
    )
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[[3, 20]] = -100
    return student, head, teacher, labels


def loss_of(student, head, labels, weights, teacher=None, softcaps=(None, None), **more):
    """The fused loss of plain tensors."""
    theirs = None if teacher is None else Projection(*teacher, softcaps[1])
    return fused_linear_loss(
        Projection(student, head, softcaps[0]), labels, weights, theirs, **more
    )


def reference(student, head, teacher, labels, weights):
    student, head = (x.detach().double().requires_grad_() for x in (student, head))
    s, t = student @ head.T, (teacher[0].double() @ teacher[1].double().T)
    p, q = (
        torch.softmax(t / weights.divergence.temperature, -1),
        torch.softmax(s / weights.divergence.temperature, -1),
    )
    kl = (p * (p.log() - q.log())).sum(-1) * weights.divergence.temperature**2
    valid = labels >= 0
    kl, ce = kl[valid].mean(), functional.cross_entropy(s[valid], labels[valid])
    loss = weights.kl * kl + weights.ce * ce
    loss.backward()
    return loss, kl, ce, student.grad, head.grad


@pytest.mark.parametrize("theirs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_student_in_float64_learns_from_a_teacher_of_fewer_bits(name, theirs):
    """``trainer.precision=64-true``: the teacher's logits, as its own dtype gives them, in float64."""
    student, head, teacher, labels = parts(dtype=torch.float64)
    teacher = tuple(x.to(theirs) for x in teacher)
    logits = Projection(*teacher).logits().double()
    weights = LossWeights(0.7, 0.3, Divergence(name, 2.0))
    found = []
    for of in (teacher, (logits, torch.eye(VOCABULARY, dtype=torch.float64))):
        x, w = (part.detach().clone().requires_grad_() for part in (student, head))
        result = loss_of(x, w, labels, weights, of, chunk_tokens=8)
        result.loss.backward()
        found.append((result.loss, result.divergence, x.grad, w.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float64 and torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(),
        LossWeights(divergence=Divergence(temperature=2.0)),
        LossWeights(ce=0.3),
        LossWeights(0.7, 0.3, Divergence(temperature=0.5)),
        LossWeights(0.0, 1.0),
    ],
)
def test_values_and_gradients(weights, chunk):
    student, head, teacher, labels = parts()
    terms = loss_of(student, head, labels, weights, teacher, chunk_tokens=chunk)
    (3 * terms.loss).backward()
    loss, kl, ce, grad_student, grad_head = reference(student, head, teacher, labels, weights)
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    if weights.kl:
        assert terms.divergence.item() == pytest.approx(kl.item(), rel=1e-5)
    assert torch.allclose(student.grad.double(), 3 * grad_student, atol=2e-6)
    assert torch.allclose(head.grad.double(), 3 * grad_head, atol=2e-6)


@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights(0.7, 0.3, Divergence(temperature=0.5)), LossWeights(0.0, 1.0)],
)
def test_the_compiled_loss_follows_the_same_formula(weights):
    student, head, teacher, labels = parts()
    terms = loss_of(student, head, labels, weights, teacher, chunk_tokens=16, compiled=True)
    (3 * terms.loss).backward()
    loss, _, ce, grad_student, grad_head = reference(student, head, teacher, labels, weights)
    assert (terms.loss.item(), terms.ce.item()) == pytest.approx((loss.item(), ce.item()), rel=1e-5)
    assert torch.allclose(student.grad.double(), 3 * grad_student, atol=2e-6)
    assert torch.allclose(head.grad.double(), 3 * grad_head, atol=2e-6)


def test_tau_squared_keeps_the_gradient_scale():
    # for large tau, tau^2 KL tends to half the variance of the centred logit difference: it does not vanish
    teacher, student = torch.randn(4, 50), torch.randn(4, 50)
    difference = (teacher - student).double()
    limit = 0.5 * (difference - difference.mean(-1, keepdim=True)).square().mean(-1)
    assert torch.allclose(forward_kl(teacher, student, 30.0).double(), limit, rtol=0.05)


def test_the_divergence_of_equal_models_is_zero_and_so_is_its_gradient():
    student, head, _, labels = parts()
    terms = loss_of(student, head, labels, LossWeights(), (student.detach(), head.detach()))
    terms.loss.backward()
    assert abs(terms.loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_the_student_is_taught():
    """Gradient steps on the fused loss bring the student's distribution to the teacher's.

    A peer's gradient is zero.
    """
    student, head, teacher, labels = parts()
    optimiser = torch.optim.Adam([student, head], 0.05)
    losses = []
    for _ in range(150):
        terms = loss_of(student, head, labels, LossWeights(), teacher, chunk_tokens=16)
        optimiser.zero_grad()
        terms.loss.backward()
        optimiser.step()
        losses.append(terms.loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_masked_tokens_get_no_gradient_and_do_not_count():
    student, head, teacher, labels = parts()
    loss_of(student, head, labels, LossWeights(1, 1), teacher, chunk_tokens=8).loss.backward()
    assert student.grad[labels < 0].abs().max() == 0
    assert student.grad[labels >= 0].abs().min(1).values.max() > 0


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    """The largest tensor that is ever allocated, forward and backward, is a chunk: seen by the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.dim() == 2
                    and tensor.shape[-1] == VOCABULARY
                ):
                    Largest.rows = max(Largest.rows, tensor.shape[0])
            return out

    student, head, teacher, labels = parts()

    def learn(chunk_tokens):
        terms = LossWeights(1, 1, Divergence(temperature=2.0))
        with Largest():
            loss_of(
                student, head, labels, terms, teacher, chunk_tokens=chunk_tokens
            ).loss.backward()

    learn(5)
    # the transposed head is HIDDEN (TEACHER) x VOCABULARY; logits would have a row per token
    assert Largest.rows == TEACHER < TOKENS
    Largest.rows = 0
    learn(30)
    assert Largest.rows == 30  # the watch does see chunks


def test_bfloat16_gradients_stay_close_to_float64():
    student, head, teacher, labels = parts(dtype=torch.bfloat16)
    loss_of(student, head, labels, LossWeights(), teacher, chunk_tokens=4).loss.backward()
    _, _, _, grad_student, grad_head = reference(student, head, teacher, labels, LossWeights())
    for found, expected in ((student.grad, grad_student), (head.grad, grad_head)):
        assert (found.double() - expected).norm() / expected.norm() < 0.03


def test_mixed_precision_reaches_float32_parameters():
    student, head, teacher, labels = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss_of(student, head, labels, LossWeights(), teacher)
    terms.loss.backward()
    assert head.grad.dtype == torch.float32
    _, _, _, _, expected = reference(student, head, teacher, labels, LossWeights())
    assert (head.grad.double() - expected).norm() / expected.norm() < 0.03


def test_what_cannot_be_is_refused():
    student, head, teacher, labels = parts()
    with pytest.raises(ValueError, match="needs a teacher"):
        loss_of(student, head, labels, LossWeights())
    with pytest.raises(ValueError, match="teacher has 99 entries, student 101"):
        loss_of(student, head, labels, LossWeights(), (teacher[0], teacher[1][:99]))


def test_the_cross_entropy_of_a_model_alone():
    student, head, teacher, labels = parts()
    found = cross_entropy(Projection(student, head, 5.0), labels)
    found.loss.backward()
    exact, exact_head = (x.detach().double().requires_grad_() for x in (student, head))
    logits, valid = 5 * torch.tanh(exact @ exact_head.T / 5), labels >= 0
    expected = functional.cross_entropy(logits[valid], labels[valid])
    expected.backward()
    assert found.loss.item() == found.ce.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.named().keys() == {"loss", "ce"}
    assert torch.allclose(student.grad.double(), exact.grad, atol=2e-6)
    assert torch.allclose(head.grad.double(), exact_head.grad, atol=2e-6)
    mixed = loss_of(student, head, labels, LossWeights(0.0, 1.0), teacher, (5.0, None))
    assert torch.equal(mixed.loss, found.loss)  # a teacher without weight changes nothing


def test_the_scale_of_float16_training_saves_small_gradients():
    """Gradients of a mean over many tokens and a large vocabulary underflow in float16 unless scaled in time."""
    torch.manual_seed(0)
    student = torch.randn(2048, 8, dtype=torch.float16, requires_grad=True)
    head = (torch.randn(8192, 8) * 0.1).half().requires_grad_()
    teacher = (torch.randn(2048, 8).half(), (torch.randn(8192, 8) * 0.1).half())
    labels = torch.zeros(2048, dtype=torch.long)
    terms = loss_of(student, head, labels, LossWeights(), teacher, chunk_tokens=256)
    (terms.loss * 2.0**14).backward()
    _, _, _, grad_student, grad_head = reference(student, head, teacher, labels, LossWeights())
    for found, expected in ((student.grad, grad_student), (head.grad, grad_head)):
        assert (found.double() / 2.0**14 - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights(0.7, 0.3, Divergence(temperature=2.0)), LossWeights(0.0, 1.0)],
)
@pytest.mark.parametrize("softcaps", [(5.0, 8.0), (None, 8.0), (5.0, None)])
def test_softcapped_logits_and_their_gradients(weights, softcaps):
    student, head, teacher, labels = parts()
    terms = loss_of(student, head, labels, weights, teacher, softcaps, chunk_tokens=8)
    terms.loss.backward()

    def capped(x, cap):
        return x if cap is None else cap * torch.tanh(x / cap)

    hidden, weight = (x.detach().double().requires_grad_() for x in (student, head))
    s = capped(hidden @ weight.T, softcaps[0])
    t = capped(teacher[0].double() @ teacher[1].double().T, softcaps[1])
    p, q = (
        torch.softmax(t / weights.divergence.temperature, -1),
        torch.log_softmax(s / weights.divergence.temperature, -1),
    )
    valid = labels >= 0
    kl = (p * (p.log() - q)).sum(-1)[valid].mean() * weights.divergence.temperature**2
    ce = functional.cross_entropy(s[valid], labels[valid])
    (weights.kl * kl + weights.ce * ce).backward()
    assert terms.loss.item() == pytest.approx((weights.kl * kl + weights.ce * ce).item(), rel=1e-5)
    assert torch.allclose(student.grad.double(), hidden.grad, atol=2e-6)
    assert torch.allclose(head.grad.double(), weight.grad, atol=2e-6)


def naive(name, teacher, student, tau=1.0, beta=0.5, top_k=7):
    """Every divergence by the letter, token by token, float64."""
    values = []
    for t, s in zip(teacher.double(), student.double(), strict=True):
        p, q = torch.softmax(t / tau, -1), torch.softmax(s / tau, -1)

        def kl(a, b):
            return (a * (a / b).log()).sum()

        if name == "forward_kl":
            value = kl(p, q) * tau**2
        elif name == "reverse_kl":
            value = kl(q, p) * tau**2
        elif name == "jsd":
            middle = beta * p + (1 - beta) * q
            value = (beta * kl(p, middle) + (1 - beta) * kl(q, middle)) * tau**2
        elif name == "topk_kl":
            best = p.topk(top_k).indices
            rest = torch.ones(len(p), dtype=torch.bool)
            rest[best] = False
            value = (
                kl(
                    torch.cat([p[best], p[rest].sum()[None]]),
                    torch.cat([q[best], q[rest].sum()[None]]),
                )
                * tau**2
            )
        elif name == "mse":
            value = ((t - s) ** 2).mean()
        else:
            value = 1 - (t @ s) / (t.norm() * s.norm())
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_and_its_gradient_against_the_formula(name, tau):
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 40), torch.randn(6, 40, requires_grad=True)
    divergence = Divergence(name, tau, beta=0.3, top_k=7)
    found = divergence(teacher, student)
    assert found.shape == (6,) and found.dtype == torch.float32
    exact = student.detach().double().requires_grad_()
    expected = naive(name, teacher, exact, tau, beta=0.3)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    assert torch.allclose(student.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda s: divergence(teacher.double(), s), exact.detach().requires_grad_()
    )


@pytest.mark.parametrize("ce", [0.0, 0.4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_fused_with_the_output_projection(name, ce):
    student, head, teacher, labels = parts()
    weights = LossWeights(0.7, ce, Divergence(name, 2.0, 0.3, 7))
    terms = loss_of(student, head, labels, weights, teacher, (5.0, 8.0), chunk_tokens=8)
    terms.loss.backward()
    exact, exact_head = (x.detach().double().requires_grad_() for x in (student, head))
    s = 5 * torch.tanh(exact @ exact_head.T / 5)
    t = 8 * torch.tanh(teacher[0].double() @ teacher[1].double().T / 8)
    valid = labels >= 0
    value = naive(name, t[valid], s[valid], 2.0, 0.3).mean()
    loss = 0.7 * value + ce * functional.cross_entropy(s[valid], labels[valid])
    loss.backward()
    assert terms.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert terms.divergence.item() == pytest.approx(value.item(), rel=1e-4)
    assert torch.allclose(student.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)
    assert torch.allclose(head.grad.double(), exact_head.grad, rtol=1e-3, atol=1e-5)
    assert student.grad[valid].abs().max() > 1e-5  # it teaches


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_do_not_diverge(name):
    logits = torch.randn(5, 30, dtype=torch.float64)
    assert Divergence(name, top_k=4)(logits, logits.clone()).abs().max() < 1e-12


def test_the_tail_bucket_sees_mass_that_moves_into_the_tail():
    """Renormalised inside the top k, this student would be perfect."""
    teacher = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[4.0, 3.0, 9.0, 9.0, 9.0, 9.0]])
    kept = torch.log_softmax(teacher[:, :2], -1), torch.log_softmax(student[:, :2], -1)
    assert torch.equal(*kept)
    assert float(topk_kl(teacher, student, 2)) > 1
    assert float(topk_kl(teacher, student, 6)) == pytest.approx(float(forward_kl(teacher, student)))


def test_entries_that_pad_a_vocabulary_count_for_nothing():
    student, head, teacher, labels = parts()
    labels = labels.clamp(max=89)
    expected = loss_of(
        student,
        head[:90].detach(),
        labels,
        LossWeights(1, 0.5),
        (teacher[0], teacher[1][:90]),
        chunk_tokens=8,
    )
    padded = (teacher[0], torch.cat([teacher[1][:95], torch.full((12, TEACHER), 1e4)])[:99])
    found = loss_of(
        student, head, labels, LossWeights(1, 0.5), padded, chunk_tokens=8, vocabulary=90
    )
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    found.loss.backward()
    assert head.grad[90:].abs().max() == 0 and head.grad[:90].abs().min(1).values.max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "kl"}, "expected one of forward_kl"),
        ({"temperature": 0}, "temperature: expected a number above 0"),
        ({"beta": 1.0}, "beta: expected a number between 0 and 1"),
        ({"top_k": 0}, "top_k: expected at least 1"),
    ],
)
def test_divergences_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**settings)


@pytest.mark.parametrize("ce", [0.0, 0.4])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_terms_that_skip_tokens_are_those_of_the_tokens_that_count(name, ce, tau):
    """On accelerators all tokens stay, so that the host need not know which count."""
    draw = torch.Generator().manual_seed(0)
    student_CV, teacher_CV = torch.randn(2, 9, 31, generator=draw, dtype=torch.float64)
    labels_C = torch.randint(0, 31, (9,), generator=draw)
    labels_C[::4] = -100
    weights = LossWeights(0.7, ce, Divergence(name, temperature=tau, top_k=5))
    kind, valid_C = ByHand, labels_C >= 0

    def terms(skips, rows):
        pair = (Logits(logits_CV[rows].clone()) for logits_CV in (student_CV, teacher_CV))
        return kind(weights, skips=skips)(*pair, labels_C[rows], True)

    some, every = terms(False, valid_C), terms(True, slice(None))
    torch.testing.assert_close(every.sums, some.sums)
    torch.testing.assert_close(every.grad_CV[valid_C], some.grad_CV)
    assert not every.grad_CV[~valid_C].any()
