"""Products of low-precision operands that stay in float32."""

import threading

import pytest
import torch

from nemo_minitron.losses import wide_matmul
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.wide_matmul import add_products, scaled, wide_linear


def drawn(*shape, dtype):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    ).to(dtype)


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_results_are_as_exact_as_the_operands(monkeypatch, dtype, bound):
    monkeypatch.setattr(
        wide_matmul, "TILE_BYTES", 4 * 96 * 100
    )  # several tiles, the last one smaller
    hidden_CH, weight_VH = drawn(17, 96, dtype=dtype), drawn(333, 96, dtype=dtype)
    exact = hidden_CH.double() @ weight_VH.double().T
    found = wide_linear(hidden_CH, weight_VH)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(found, exact) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_added_to_what_is_there(monkeypatch, dtype):
    monkeypatch.setattr(wide_matmul, "TILE_BYTES", 4 * 96 * 100)
    hidden_CH, weight_VH = drawn(17, 96, dtype=dtype), drawn(333, 96, dtype=dtype)
    grad_CV = drawn(17, 333, dtype=wide_matmul.wide_dtype(dtype))
    sum_CH, sum_VH = (
        torch.ones(17, 96, dtype=grad_CV.dtype),
        torch.ones(333, 96, dtype=grad_CV.dtype),
    )
    add_products(grad_CV, hidden_CH, weight_VH, sum_CH, sum_VH)
    # of low precision the gradient counts as rounded to it
    bound = 3e-3 if dtype in (torch.bfloat16, torch.float16) else 1e-6
    assert error(sum_CH - 1, grad_CV.double() @ weight_VH.double()) < bound
    assert error(sum_VH - 1, grad_CV.double().T @ hidden_CH.double()) < bound
    assert scaled(sum_VH, torch.tensor(0.5, dtype=grad_CV.dtype), dtype).dtype == dtype


def test_the_setting_is_put_back_also_by_threads_side_by_side():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    hidden_CH, weight_VH = (
        drawn(17, 96, dtype=torch.bfloat16),
        drawn(3000, 96, dtype=torch.bfloat16),
    )
    threads = [threading.Thread(target=wide_linear, args=(hidden_CH, weight_VH)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        wide_linear(hidden_CH, weight_VH[:, :-1])
    assert matmul.fp32_precision == before


def test_bfloat16_gradients_err_only_by_their_own_rounding():
    tokens, hidden, entries = 64, 32, 500
    values = [
        drawn(tokens, hidden, dtype=torch.bfloat16),
        drawn(entries, hidden, dtype=torch.bfloat16),
    ]
    pair = (drawn(tokens, 48, dtype=torch.bfloat16), drawn(entries, 48, dtype=torch.bfloat16))
    labels_T = torch.arange(tokens)

    def gradients(dtype):
        leaves = [value.to(dtype).clone().requires_grad_() for value in values]
        teacher = Projection(pair[0].to(dtype), pair[1].to(dtype))
        weights = LossWeights(1, 0.3)
        fused_linear_loss(
            Projection(*leaves), labels_T, weights, teacher, chunk_tokens=10
        ).loss.backward()
        return [leaf.grad for leaf in leaves]

    for found, exact in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert found.dtype == torch.bfloat16
        rounding = error(exact.bfloat16(), exact)
        assert rounding < error(found, exact) < 2 * rounding
