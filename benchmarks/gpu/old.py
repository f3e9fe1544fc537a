"""On a GPU: the loss against the CPU's and the naive one, a large step, and trainings by several engines.

The step is one of an 8B-shaped teacher and a 4B-shaped student with random weights, with more tokens every time until
memory runs out. The trainings, under FSDP2 and Transformer Engine among others, stand beside a plain one. ``--try`` runs the same code on the CPU with tiny sizes, to see that it works before a GPU is at hand.
"""

import argparse
import datetime
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.duel import RESULTS
from nemo_minitron.families import families
from nemo_minitron.losses.divergences import forward_kl
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.causal_lm import frozen, head_of, hidden_states
from nemo_minitron.models.int8 import quantise
from nemo_minitron.workspace.training_log import read_log

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_4B = {**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 9216}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


class Clock:
    """Seconds and peak memory on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, run: Callable[[], object], repeats: int = 3) -> tuple[float, float]:
        """Milliseconds (best) and GiB of peak growth; infinite where memory runs out."""
        try:
            run()
            self.wait()
            before = 0
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            best = float("inf")
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                self.wait()
                best = min(best, 1000 * (time.perf_counter() - start))
            return best, (torch.cuda.max_memory_allocated() - before) / 2**30 if self.cuda else 0.0
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return float("inf"), float("inf")


def gradients(device: str, dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
    """Gradients of the fused loss on one fixed small problem."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((512, 256), (4096, 256), (512, 256), (4096, 256))
    values = [
        (torch.randn(*shape, generator=generator) * 0.2).to(device, dtype) for shape in shapes
    ]
    student, head = values[0].requires_grad_(), values[1].requires_grad_()
    labels = torch.arange(512, device=device)
    teacher = Projection(values[2], values[3])
    fused_linear_loss(
        Projection(student, head),
        labels,
        LossWeights(1, 0.5),
        teacher,
        chunk_tokens=128,
        compiled=compiled,
    ).loss.backward()
    assert student.grad is not None and head.grad is not None
    return [student.grad.double().cpu(), head.grad.double().cpu()]


def parity(device: str) -> dict[str, list[float]]:
    """Relative errors of both gradients against float64 on the CPU."""
    exact = gradients("cpu", torch.float64, False)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        for compiled in (False, True):
            found = gradients(device, dtype, compiled)
            name = f"{str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}"
            errors[name] = [
                float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
            ]
    return errors


def loss(device: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, tuple[float, float]]:
    """The loss against its four matrix products and against the naive one, bf16."""
    make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    student = torch.randn(tokens, hidden, **make).requires_grad_()
    head = (torch.randn(vocabulary, hidden, **make) * 0.02).requires_grad_()
    teacher, teacher_head = (
        torch.randn(tokens, hidden, **make),
        torch.randn(vocabulary, hidden, **make) * 0.02,
    )
    labels = torch.randint(0, vocabulary, (tokens,), device=device)

    def fused(compiled: bool) -> Callable[[], None]:
        def run() -> None:
            student.grad = head.grad = None
            ours, theirs = Projection(student, head), Projection(teacher, teacher_head)
            fused_linear_loss(
                ours, labels, LossWeights(), theirs, compiled=compiled
            ).loss.backward()

        return run

    def naive() -> None:
        student.grad = head.grad = None
        forward_kl(teacher @ teacher_head.T, student @ head.T).mean().backward()

    def products() -> None:
        for start in range(0, tokens, 1024):
            part = student.detach()[start : start + 1024]
            logits = part @ head.detach().T
            _ = (
                teacher[start : start + 1024] @ teacher_head.T,
                logits @ head.detach(),
                logits.T @ part,
            )

    contestants = {
        "products": products,
        "fused": fused(False),
        "fused, compiled": fused(True),
        "naive": naive,
    }
    clock = Clock(device)
    return {name: clock.measure(run) for name, run in contestants.items()}


def random_model(config: dict[str, Any], device: str) -> Any:
    """A model with random weights in bf16, made on the device."""
    import transformers

    settings = transformers.AutoConfig.for_model(**config)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)


def step(device: str, shapes: Sequence[dict[str, Any]], length: int, int8: bool) -> dict[str, Any]:
    """Tokens a second of a distillation step with AdamW (bf16-true, activation checkpointing), more tokens every time."""
    family, clock = families()["llama"], Clock(device)
    teacher = random_model(shapes[0], device).eval().requires_grad_(False)
    teacher = quantise(teacher, family) if int8 else teacher
    student = random_model(shapes[1], device).train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    found: dict[str, Any] = {"tokens_per_second": {}, "peak_gib": {}, "most_tokens": 0}
    samples = 1
    while samples <= (2 if device == "cpu" else 64):
        tokens_BS = torch.randint(0, shapes[0]["vocab_size"], (samples, length + 1), device=device)

        def run(tokens_BS: torch.Tensor = tokens_BS) -> None:
            with frozen(teacher):
                teacher_TG = hidden_states(teacher, family, tokens_BS[:, :-1]).flatten(0, 1)
            student_TH = hidden_states(student, family, tokens_BS[:, :-1]).flatten(0, 1)
            ours, theirs = (
                Projection(student_TH, head_of(student)),
                Projection(teacher_TG, head_of(teacher)),
            )
            labels_T = tokens_BS[:, 1:].flatten()
            fused_linear_loss(ours, labels_T, LossWeights(), theirs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        milliseconds, _ = clock.measure(run, 2)
        if milliseconds == float("inf"):
            break
        found["most_tokens"] = samples * length
        found["tokens_per_second"][samples * length] = 1000 * samples * length / milliseconds
        if clock.cuda:
            found["peak_gib"][samples * length] = torch.cuda.max_memory_allocated() / 2**30
        samples *= 2
    return found


def trainings(device: str, tiny: bool) -> dict[str, list[float]]:
    """Losses of short trainings of one pruned model, by engine; FSDP2 must have those of the plain one."""
    from nemo_minitron.config.compose import load_config
    from nemo_minitron.stages.run import run_stage

    ways: dict[str, list[str]] = {
        "plain": [],
        "bf16-mixed": ["trainer.precision=bf16-mixed"],
        "FSDP2 on one rank": ["training.parallel=shard"],
        "compiled": ["training.compile=true"],
    }
    if importlib.util.find_spec("transformer_engine") and device == "cuda":
        mixed = ["trainer.precision=bf16-mixed"]
        ways["Transformer Engine"] = [*mixed, "training.transformer_engine=on"]
        ways["Transformer Engine, FP8"] = [*mixed, "training.transformer_engine=fp8"]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        config = load_config(
            "demo", [f"workspace={place}/teacher", "pretrain.trainer.max_steps=20"]
        )
        run_stage("pretrain", config)
        for number, (name, words) in enumerate(ways.items()):
            workspace = f"{place}/{number}"
            config = load_config(
                "demo",
                [
                    f"workspace={workspace}", f"source.model={place}/teacher/pretrain/hf", "pretrain.enabled=false",
                    f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}",
                    f"trainer.max_steps={3 if tiny else 30}", "trainer.log_every_n_steps=1",
                    "trainer.enable_progress_bar=false", "score.importance=magnitude", *words,
                ],
            )  # fmt: skip
            for stage in ("download", "score", "plan", "prune", "distill"):
                run_stage(stage, config)
            lines = read_log(Path(workspace) / "student" / "metrics.jsonl")
            found[name] = [line["loss"] for line in lines if "loss" in line]
            print(f"  {name:<24} last loss {found[name][-1]:.5f}", flush=True)
    apart = [
        abs(a - b) / a for a, b in zip(found["plain"], found["FSDP2 on one rank"], strict=True)
    ]
    assert max(apart) < 1e-3, (
        f"FSDP2 on one rank departs from the plain training by {max(apart):.1e}"
    )
    return found


def main() -> int:
    """Checks, measures, prints and writes benchmarks/results/gpu-DATE-CARD.json."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--try", dest="tiny", action="store_true")
    tiny = arguments.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        print("make gpu: no CUDA device here", file=sys.stderr)
        return 2
    device = "cpu" if tiny else "cuda"
    card = "cpu" if tiny else torch.cuda.get_device_name()
    date = datetime.date.today().isoformat()
    results: dict[str, Any] = {"card": card, "date": date, "torch": torch.__version__}
    results["errors"] = parity(device)
    print(f"{card}: gradient errors against float64 {results['errors']}")
    size = (64, 32, 1000) if tiny else (8192, 4096, 151_936)
    results["loss"] = loss(device, *size)
    print(
        f"loss, {size[0]} tokens, hidden {size[1]}, vocabulary {size[2]}, bf16 (aim 1.4 x, 2 GiB)"
    )
    for name, (milliseconds, memory) in results["loss"].items():
        ratio = milliseconds / results["loss"]["products"][0]
        print(
            f"  {name:<16} {milliseconds:9.1f} ms  {ratio:5.2f} x the four products  {memory:6.2f} GiB"
        )
    shapes = [{**config, **(TINY if tiny else {})} for config in (LLAMA_8B, LLAMA_4B)]
    for name, int8 in (("bf16", False), ("int8", True)):
        results[f"step, {name} teacher"] = found = step(device, shapes, 32 if tiny else 2048, int8)
        print(f"8B-shaped teacher in {name} to 4B-shaped student: {found}", flush=True)
        if not tiny:
            torch.cuda.empty_cache()
    print("trainings")
    results["trainings"] = trainings(device, tiny)
    if not tiny:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"gpu-{date}-{card.replace(' ', '-')}.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
