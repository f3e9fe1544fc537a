"""The fused loss: whether its gradients are right on this card, and its time against the four matrix products."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.clock import Row, device_of, measure, rows_of
from nemo_minitron.losses import loss_terms
from nemo_minitron.losses.divergences import Divergence, forward_kl
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.losses.sparse_targets import SparseTargets

SIZES = {
    "8192 x 4096 x 151,936": (8192, 4096, 151_936),
    "4096 x 2048 x 262,144": (4096, 2048, 262_144),
    "16384 x 576 x 49,152": (16_384, 576, 49_152),
}
"""Tokens, hidden size and vocabulary: Qwen 2.5 7B's, Gemma 3's, SmolLM2's."""


def gradients(
    device: str,
    dtype: torch.dtype,
    entries: int,
    tau: float,
    caps: tuple[float | None, float | None],
    divergence: str,
) -> list[torch.Tensor]:
    """Value and gradients of one fixed small problem, some of whose tokens do not count."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((512, 256), (entries, 256), (512, 256), (entries, 256))
    # the same numbers in every dtype
    values = [(torch.randn(*shape, generator=generator) * 0.2).bfloat16() for shape in shapes]
    values = [value.to(device, dtype) for value in values]
    student, head = values[0].requires_grad_(), values[1].requires_grad_()
    labels = torch.arange(512, device=device) % entries
    labels[::7] = -100
    found = fused_linear_loss(
        Projection(student, head, caps[0]),
        labels,
        LossWeights(1, 0.5, Divergence(divergence, tau)),
        Projection(values[2], values[3], caps[1]),
        chunk_tokens=128,
    )
    found.loss.backward()
    assert student.grad is not None and head.grad is not None
    return [part.detach().double().cpu() for part in (found.loss, student.grad, head.grad)]


def errors(device: str) -> list[Row]:
    """Relative errors of loss and both gradients against float64 on the CPU."""
    rows = []
    cases = [
        (4096, 1.0, (None, None), "forward_kl"), (40_001, 1.0, (None, None), "forward_kl"),
        (4099, 2.0, (None, None), "forward_kl"), (4096, 1.0, (8.0, 12.0), "forward_kl"),
        (4096, 2.0, (None, None), "jsd"), (4096, 1.0, (8.0, None), "topk_kl"),
    ]  # fmt: skip
    for entries, tau, caps, divergence in cases:
        exact = gradients("cpu", torch.float64, entries, tau, caps, divergence)
        for dtype in (torch.float32, torch.bfloat16):
            found = gradients(device, dtype, entries, tau, caps, divergence)
            apart = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
            kind = f"{divergence}, {str(dtype).removeprefix('torch.')}"
            name = f"error, {kind}, {entries}, t={tau}, cap={caps[0]}"
            said = ", ".join(f"{value:.1e}" for value in apart)
            rows.append(Row(name, 0.0, note=f"{said} (loss, hidden, head)"))
            assert max(apart) < (1e-5 if dtype == torch.float32 else 5e-3), f"{name}: {said}"
    return rows


def eager(run: Callable[[], None]) -> Callable[[], None]:
    """The same without Triton's kernels."""

    def without() -> None:
        held = loss_terms._triton_kernels
        loss_terms._triton_kernels = lambda: None  # type: ignore[assignment]
        try:
            run()
        finally:
            loss_terms._triton_kernels = held

    return without


def times(device: str, tokens: int, hidden: int, vocabulary: int) -> list[Row]:
    """The loss and its gradients in bf16, whole and fused, against the four products."""
    make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    student = torch.randn(tokens, hidden, **make).requires_grad_()
    head = (torch.randn(vocabulary, hidden, **make) * 0.02).requires_grad_()
    teacher = torch.randn(tokens, hidden, **make)
    teacher_head = torch.randn(vocabulary, hidden, **make) * 0.02
    labels = torch.randint(0, vocabulary, (tokens,), device=device)

    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    known = SparseTargets(  # distinct ids, whose masses and the others' add up to 1
        (torch.arange(64, device=device) * 7) % vocabulary + torch.zeros_like(labels)[:, None],
        torch.log_softmax(torch.randn(tokens, 64, **draw), -1) - math.log(2),
        torch.full((tokens,), -math.log(2), device=device),
    )  # fmt: skip

    def fused(
        weights: LossWeights, compiled: bool = False, known: SparseTargets | None = None
    ) -> Callable[[], None]:
        def run() -> None:
            student.grad = head.grad = None
            ours = Projection(student, head)
            theirs = Projection(teacher, teacher_head) if known is None else known
            taught = theirs if weights.kl else None
            fused_linear_loss(ours, labels, weights, taught, compiled=compiled).loss.backward()

        return run

    def whole() -> None:
        student.grad = head.grad = None
        forward_kl(teacher @ teacher_head.T, student @ head.T).mean().backward()

    def products(count: int = 4) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, tokens, 1024):
                part = student.detach()[start : start + 1024]
                logits = part @ head.detach().T
                _ = logits @ head.detach(), logits.T @ part
                if count == 4:
                    _ = teacher[start : start + 1024] @ teacher_head.T

        return run

    def liger() -> Callable[[], None] | None:
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        except ImportError:
            return None
        jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

        def run() -> None:
            student.grad = head.grad = None
            jsd(student, head, teacher, teacher_head, labels).backward()

        return run

    ways = {
        "four products": products(),
        "KL": fused(LossWeights()),
        "KL + cross-entropy": fused(LossWeights(0.5, 0.5)),
        "KL, torch's operations": eager(fused(LossWeights())),
        "KL, torch.compile": eager(fused(LossWeights(), True)),
        "KL, whole logits": whole,
        "KL, Liger": liger(),
        "JSD": fused(LossWeights(1, 0, Divergence("jsd"))),
        "JSD, torch.compile": fused(LossWeights(1, 0, Divergence("jsd")), True),
    }
    measured = {name: measure(device, run) for name, run in ways.items() if run is not None}
    alone = {
        "three products": measure(device, products(3)),
        "cross-entropy": measure(device, fused(LossWeights(0, 1))),
        "64 known entries": measure(device, fused(LossWeights(), False, known)),
        "64 known entries, torch.compile": measure(device, fused(LossWeights(), True, known)),
    }
    return [*rows_of(measured, "four products"), *rows_of(alone, "three products")]


def rows(tiny: bool) -> Iterator[Row]:
    """Errors, and times by size."""
    device = device_of(tiny)
    yield from errors(device)
    for name, size in ({"64 x 32 x 1000": (64, 32, 1000)} if tiny else SIZES).items():
        yield Row(name, 0.0)
        yield from times(device, *size)
        if not tiny:
            torch.cuda.empty_cache()
