"""In one cut or in two, in plain torch: ``python -m benchmarks.paper.checks.two_cuts MODEL TEXT.jsonl``.

MODEL and TEXT: those of benchmarks/paper/checks/width_or_depth.py. The teacher is cut to a quarter (sizes of
benchmarks/paper/in_steps.py) and learns for N steps; or it is cut to the first width of that script, learns for N / 2, is cut from there,
and learns for N / 2 again, from the first teacher or from the middle model. Rankings, slicing and training are that script's. Several N
show whether the order is one of short trainings.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.paper.checks.width_or_depth import (
    BATCH,
    Keep,
    best,
    best_heads,
    cut,
    importance,
    loss,
    texts,
    train,
    whole,
)

MIDDLE, QUARTER = (48, 4, 200, 6), (32, 4, 96, 4)
"""Channels, heads, neurons, layers."""


def smaller(model: Any, samples: torch.Tensor, sizes: tuple[int, int, int, int]) -> Any:
    """A model cut to sizes, by activations and block influence."""
    hidden, heads, neurons, layers = sizes
    scores, everything = importance(model, samples), whole(model)
    own = scores["heads"]
    of_heads = (
        [best_heads(of, heads // 4) for of in own] if own.shape[1] > heads else everything.heads
    )
    return cut(
        model,
        Keep(
            best(scores["hidden"], hidden), best(scores["layers"], layers),
            of_heads, [best(of, neurons) for of in scores["ffn"]],
        ),
    )  # fmt: skip


def main() -> None:
    """Prints the losses of each way, before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[120, 480])
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    calibration, held_out, taught = texts(args.text, tokenizer, BATCH * max(args.steps))
    print(f"teacher {loss(teacher, held_out):.4f}", flush=True)
    for steps in args.steps:
        first, rest = taught[: BATCH * steps // 2], taught[BATCH * steps // 2 : BATCH * steps]
        student = smaller(teacher, calibration, QUARTER)
        before = loss(student, held_out)
        train(student, taught[: BATCH * steps], 2e-3, teacher)
        _told(steps, "one cut", before, loss(student, held_out))
        middle = smaller(teacher, calibration, MIDDLE)
        train(middle, first, 2e-3, teacher)
        middle.eval()
        for name, whose in (("the first", teacher), ("the middle", middle)):
            student = smaller(middle, calibration, QUARTER)
            before = loss(student, held_out)
            train(student, rest, 2e-3, whose)
            _told(steps, f"two cuts, taught by {name}", before, loss(student, held_out))


def _told(steps: int, name: str, before: float, after: float) -> None:
    print(
        f"{steps:>5} steps, {name:<32} {before:.4f} after the cut, {after:.4f} after training",
        flush=True,
    )


if __name__ == "__main__":
    main()
