"""On a GPU: parity of the loss with the CPU, its precision in bf16, and its memory and speed against the naive one."""

import datetime
import json
import sys
from collections.abc import Callable

import torch

from benchmarks.duel import RESULTS
from nemo_minitron.core.divergences import forward_kl
from nemo_minitron.core.losses import LossWeights, fused_linear_loss

TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 151_936


def gradients(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of the fused loss on one fixed small problem, on the CPU in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((512, 256), (4096, 256), (512, 256), (4096, 256))
    values = [(torch.randn(*shape, generator=generator) * 0.2).to(device, dtype) for shape in shapes]
    student, head = values[0].requires_grad_(), values[1].requires_grad_()
    labels = torch.arange(512, device=device)
    fused_linear_loss(student, head, labels, LossWeights(1, 0.5), (values[2], values[3]), 128).loss.backward()
    assert student.grad is not None and head.grad is not None
    return [student.grad.double().cpu(), head.grad.double().cpu()]


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds (best of three) and GiB of peak growth; infinite where memory runs out."""
    try:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        best = float("inf")
        for _ in range(3):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(stop))
        return best, (torch.cuda.max_memory_allocated() - before) / 2**30
    except torch.cuda.OutOfMemoryError:
        return float("inf"), float("inf")


def main() -> int:
    """Checks, measures, prints and writes benchmarks/results/gpu-DATE-CARD.json."""
    if not torch.cuda.is_available():
        print("make gpu: no CUDA device here", file=sys.stderr)
        return 2
    exact = gradients("cpu", torch.float64)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = gradients("cuda", dtype)
        errors[str(dtype)] = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    make = {"device": "cuda", "dtype": torch.bfloat16}
    student = torch.randn(TOKENS, HIDDEN, **make).requires_grad_()
    head = (torch.randn(VOCABULARY, HIDDEN, **make) * 0.02).requires_grad_()
    teacher, teacher_head = (
        torch.randn(TOKENS, HIDDEN, **make),
        torch.randn(VOCABULARY, HIDDEN, **make) * 0.02,
    )
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")

    def fused() -> None:
        student.grad = head.grad = None
        fused_linear_loss(student, head, labels, LossWeights(), (teacher, teacher_head), 1024).loss.backward()

    def naive() -> None:
        student.grad = head.grad = None
        forward_kl(teacher @ teacher_head.T, student @ head.T).mean().backward()

    def products() -> None:
        for start in range(0, TOKENS, 1024):
            part = student.detach()[start : start + 1024]
            logits = part @ head.detach().T
            _ = teacher[start : start + 1024] @ teacher_head.T, logits @ head.detach(), logits.T @ part

    results = {
        name: measure(run) for name, run in (("products", products), ("fused", fused), ("naive", naive))
    }
    card, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    print(
        f"{card}, {TOKENS} tokens, hidden {HIDDEN}, vocabulary {VOCABULARY}, bf16; gradient errors {errors}"
    )
    for name, (milliseconds, memory) in results.items():
        ratio = milliseconds / results["products"][0]
        print(f"  {name:<10} {milliseconds:9.1f} ms  {ratio:5.2f} x the four products  {memory:6.2f} GiB")
    RESULTS.mkdir(exist_ok=True)
    written = {"card": card, "date": date, "errors": errors, "milliseconds_and_gib": results}
    (RESULTS / f"gpu-{date}-{card.replace(' ', '-')}.json").write_text(json.dumps(written, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
