"""The loss against the naive one, Liger's and TRL's: time, peak memory and exactness of the gradients.

Each contestant runs in processes of its own (peak memory is a process's), in rounds that take turns. Liger and TRL
take part where they are installed (``pip install --no-deps liger-kernel trl``).
"""

import argparse
import ctypes
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.duel import RESULTS
from nemo_minitron.evaluation.report import markdown
from nemo_minitron.losses.divergences import DIVERGENCES, Divergence
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection

TOKENS, HIDDEN = 1024, 256
VOCABULARIES = (32_000, 128_256, 262_144)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def naive(
    student_TH: Tensor, head_VH: Tensor, teacher_TH: Tensor, teacher_VH: Tensor, _: Tensor
) -> Tensor:
    """Forward KL from whole logits."""
    log_q_TV = F.log_softmax(student_TH @ head_VH.T, -1)
    log_p_TV = F.log_softmax(teacher_TH @ teacher_VH.T, -1)
    return F.kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True)


def ours(
    student_TH: Tensor, head_VH: Tensor, teacher_TH: Tensor, teacher_VH: Tensor, labels_T: Tensor
) -> Tensor:
    """The package's."""
    student, teacher = Projection(student_TH, head_VH), Projection(teacher_TH, teacher_VH)
    return fused_linear_loss(student, labels_T, LossWeights(), teacher).loss


def naive_of(divergence: str) -> Loss:
    """Another divergence from whole logits, by autograd."""
    formula = Divergence(divergence)
    return lambda student, head, teacher, wide, _: formula(
        teacher @ wide.T, student @ head.T
    ).mean()


def ours_of(divergence: str) -> Loss:
    """The package's."""
    weights = LossWeights(1, 0, Divergence(divergence))
    return lambda student, head, teacher, wide, labels: (
        fused_linear_loss(
            Projection(student, head), labels, weights, Projection(teacher, wide)
        ).loss
    )


def liger(compiled: bool) -> Loss:
    """Liger's chunked loss at the divergence that is forward KL there, and no hard loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=compiled, chunk_size=128)
    return lambda student, head, teacher, wide, labels: loss(student, head, teacher, wide, labels)


def trl() -> Loss:
    """TRL's distillation loss, of tiles as TRL sets them."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Chunked

    return lambda student, head, teacher, wide, labels: Chunked.apply(
        student, head, None, teacher, wide, None, 0.0
    )[0].mean()


CONTESTANTS: dict[str, tuple[str | None, Callable[[], Loss]]] = {
    "naive": (None, lambda: naive),
    "this": (None, lambda: ours),
    "Liger": ("liger_kernel", lambda: liger(False)),
    "Liger, compiled": ("liger_kernel", lambda: liger(True)),
    "TRL": ("trl", trl),
}
OTHERS = tuple(name for name in DIVERGENCES if name != "forward_kl")


def contestants(divergence: str) -> dict[str, tuple[str | None, Callable[[], Loss]]]:
    """Who takes part, by name: the package that is needed, and what gives the loss."""
    if divergence == "forward_kl":
        return CONTESTANTS
    return {
        "naive": (None, lambda: naive_of(divergence)),
        "this": (None, lambda: ours_of(divergence)),
    }


def problem(vocabulary: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and heads of student and teacher, and labels; logits with a spread of about 3."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, HIDDEN), (vocabulary, HIDDEN), (tokens, HIDDEN), (vocabulary, HIDDEN))
    values = [torch.randn(*shape, generator=generator) for shape in shapes]
    values[1].mul_(3 / HIDDEN**0.5), values[3].mul_(3 / HIDDEN**0.5)
    labels_T = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return [value.to(dtype) for value in values] + [labels_T]


def gradients(loss: Loss, values: Sequence[Tensor]) -> list[Tensor]:
    """By the student's hidden states and head."""
    leaves = [value.detach().requires_grad_() for value in values[:2]]
    loss(*leaves, *values[2:]).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def measure(
    name: str, divergence: str, vocabulary: int, dtype_name: str, rounds: int
) -> dict[str, float]:
    """One contestant in this process: best seconds, MiB of peak growth, relative error of the gradients."""
    dtype = getattr(torch, dtype_name)
    loss = contestants(divergence)[name][1]()
    few = problem(4096, 256, dtype)
    exact = gradients(
        contestants(divergence)["naive"][1](), [value.double() for value in few[:4]] + few[4:]
    )
    found = gradients(loss, few)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    values = problem(vocabulary, TOKENS, dtype)
    gradients(loss, values)
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what the heap kept of the first call would hide a part of the others
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = _kib("VmRSS")
    best = float("inf")
    for turn in range(rounds + 1):
        start = time.perf_counter()
        gradients(loss, values)
        if turn or not rounds:
            best = min(best, time.perf_counter() - start)
    return {"seconds": best, "mib": (_kib("VmHWM") - before) / 1024, "error": max(errors)}


def _kib(field: str) -> int:
    with open("/proc/self/status") as status:
        found = next(line for line in status if line.startswith(field))
    return int(found.split()[1])


def apart(name: str, divergence: str, vocabulary: int, dtype: str) -> dict[str, float]:
    """The same in new processes, one for the time and one for the memory.

    By default glibc keeps what is freed below a threshold that moves, and a peak is off by tens of MiB from
    one process to the next; with a fixed one freed memory is given back, which takes time.
    """
    words = [name, divergence, str(vocabulary), dtype]
    timed = _apart([*words, "2"], os.environ)
    sized = _apart([*words, "0"], os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)})
    return timed | {"mib": sized["mib"]}


def _apart(words: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.losses", "--one", *words]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compared(
    divergence: str, vocabulary: int, dtype: str, turns: int
) -> list[dict[str, float | str]]:
    """All that take part at one size, in turns."""
    here = [
        name
        for name, (package, _) in contestants(divergence).items()
        if not package or importlib.util.find_spec(package)
    ]
    found: dict[str, dict[str, float]] = {}
    for _ in range(turns):
        for name in here:
            new = apart(name, divergence, vocabulary, dtype)
            old = found.setdefault(name, new)
            old["seconds"] = min(old["seconds"], new["seconds"])
            old["mib"] = min(old["mib"], new["mib"])
    return [
        {
            "divergence": divergence, "vocabulary": vocabulary, "dtype": dtype, "name": name,
            "time": round(result["seconds"] / found["naive"]["seconds"], 3),
            "memory": round(result["mib"] / found["naive"]["mib"], 3),
            "mib": round(result["mib"], 1), "error": result["error"],
        }
        for name, result in found.items()
    ]  # fmt: skip


def main() -> None:
    """Measures all, prints the table and writes benchmarks/results/losses.json."""
    arguments = argparse.ArgumentParser(description=__doc__)
    names = ("NAME", "DIVERGENCE", "VOCABULARY", "DTYPE", "ROUNDS")
    arguments.add_argument("--one", nargs=5, metavar=names, help=argparse.SUPPRESS)
    arguments.add_argument("--turns", type=int, default=2)
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments.add_argument(
        "--others", action="store_true", help="every other divergence, at the smallest vocabulary"
    )
    args = arguments.parse_args()
    if args.one:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        name, divergence, vocabulary, dtype, rounds = args.one
        print(json.dumps(measure(name, divergence, int(vocabulary), dtype, int(rounds))))
        return
    sizes = [("forward_kl", vocabulary) for vocabulary in VOCABULARIES]
    if args.others:
        sizes = [(divergence, VOCABULARIES[0]) for divergence in OTHERS]
    written = []
    for dtype in args.dtypes:
        for divergence, vocabulary in sizes:
            for row in compared(divergence, vocabulary, dtype, args.turns):
                written.append(row)
                print(*row.values(), flush=True)
    columns = {
        "divergence": "divergence", "vocabulary": "vocabulary", "dtype": "dtype", "name": "loss", "time": "time / naive",
        "memory": "memory / naive", "mib": "MiB", "error": "gradient error",
    }  # fmt: skip
    print(
        markdown(
            tuple(columns.values()),
            tuple(tuple(_cell(key, row[key]) for key in columns) for row in written),
        )
    )
    path = RESULTS / "losses.json"
    RESULTS.mkdir(exist_ok=True)
    kept = json.loads(path.read_text())["results"] if path.is_file() else []
    new = {(row["divergence"], row["dtype"]) for row in written}
    kept = [row for row in kept if (row["divergence"], row["dtype"]) not in new]
    lines = ",\n  ".join(json.dumps(row) for row in kept + written)
    path.write_text(f'{{"tokens": {TOKENS}, "hidden": {HIDDEN}, "results": [\n  {lines}]}}\n')


def _cell(key: str, value: float | str) -> str:
    shown = {"vocabulary": ",d", "time": ".2f", "memory": ".2f", "mib": ".0f", "error": ".1e"}
    return format(value, shown.get(key, ""))


if __name__ == "__main__":
    main()
