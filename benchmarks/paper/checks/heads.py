"""What becomes of heads that go, in plain torch: ``python -m benchmarks.paper.checks.heads MODEL TEXT.jsonl [--steps 60]``.

MODEL: the Nemotron of benchmarks/paper/checks/width_or_depth.py: 8 heads in 4 groups of two, of which the better one stays by
activations. Of the head that stays (a) and the one that goes (b), [P1] section 2.3 adds the difference: 2 a - b. It does not say
in which matrix, so that queries, output projections and both are tried; against it b dropped, b's output added to a's, and
that with the mean of the queries, or with the queries of a weighed three to one. The order must be that of
benchmarks/paper/head_merge.py.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from benchmarks.paper.checks.width_or_depth import (
    BATCH,
    HEAD,
    best_heads,
    cut,
    importance,
    loss,
    texts,
    train,
    whole,
)

Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def alone(stays: torch.Tensor, _goes: torch.Tensor) -> torch.Tensor:
    """What stays, as it is."""
    return stays


def difference(stays: torch.Tensor, goes: torch.Tensor) -> torch.Tensor:
    """[P1] section 2.3."""
    return 2 * stays - goes


def total(stays: torch.Tensor, goes: torch.Tensor) -> torch.Tensor:
    """Both together."""
    return stays + goes


WAYS: dict[str, tuple[Mix, Mix]] = {
    "dropped": (alone, alone),
    "difference in queries": (difference, alone),
    "difference in output": (alone, difference),
    "difference in both": (difference, difference),
    "sum of outputs": (alone, total),
    "sum of outputs, mean of queries": (lambda a, b: (a + b) / 2, total),
    "sum of outputs, queries 3 : 1": (lambda a, b: (3 * a + b) / 4, total),
}
"""What becomes of the query projection, and of the output projection, of a head that stays."""


def merged(
    teacher: torch.nn.Module, kept: list[list[int]], queries: Mix, output: Mix
) -> torch.nn.Module:
    """The teacher with mixtures in the place of the heads that stay."""
    model = copy.deepcopy(teacher)
    for layer, heads in zip(model.model.layers, kept, strict=True):
        rows = layer.self_attn.q_proj.weight.data.unflatten(0, (-1, HEAD))
        columns = layer.self_attn.o_proj.weight.data.unflatten(1, (-1, HEAD))
        for head in heads:
            rows[head] = queries(rows[head].clone(), rows[head ^ 1])
            columns[:, head] = output(columns[:, head].clone(), columns[:, head ^ 1])
    return model


def main() -> None:
    """Prints the losses of each way, before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    calibration, held_out, taught = texts(args.text, tokenizer, BATCH * args.steps)
    kept = [best_heads(of, 1) for of in importance(teacher, calibration)["heads"]]
    print(f"teacher: loss {loss(teacher, held_out):.4f}", flush=True)
    for name, (queries, output) in WAYS.items():
        student = cut(merged(teacher, kept, queries, output), replace(whole(teacher), heads=kept))
        before = loss(student, held_out)
        train(student, taught, 2e-3, teacher)
        after = loss(student, held_out)
        print(f"{name:<32} after the cut {before:.4f}, after training {after:.4f}", flush=True)


if __name__ == "__main__":
    main()
