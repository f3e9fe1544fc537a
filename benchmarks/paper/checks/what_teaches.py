"""What a student learns from, in plain torch: ``python -m benchmarks.paper.checks.what_teaches MODEL TEXT.jsonl [--steps 60]``.

MODEL: the Nemotron of benchmarks/paper/checks/width_or_depth.py, cut to its first width by a ranking and a slicing of that
script. Students learn on the same batches from the text, from the logits at several temperatures (with the factor tau squared),
from both, and from the logits with the teacher's states: embeddings and a layer, counted from the end, lifted by one linear layer,
1 - cosine, weighed as the logits are. ``--depth`` cuts to three layers by block influence instead, whose third from the end is the
first. The order must be that of benchmarks/paper/losses.py.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

from benchmarks.paper.checks.width_or_depth import (
    BATCH,
    choices,
    cut,
    loss,
    scheduled,
    texts,
)

Made = transformers.modeling_outputs.CausalLMOutputWithPast


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL of the teacher to the student, times tau squared."""
    p, q = ((x[:, :-1] / temperature).log_softmax(-1) for x in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def states(student: Made, teacher: Made, lift: torch.nn.Linear, layer: int) -> torch.Tensor:
    """1 - cosine of embeddings and of what comes out of a layer, counted from the end."""
    pairs = ((student.hidden_states[at], teacher.hidden_states[at]) for at in (0, layer))
    return sum(
        (1 - torch.cosine_similarity(lift(mine), theirs, dim=-1)).mean() for mine, theirs in pairs
    )


def with_states(mine: Made, theirs: Made, lift: torch.nn.Linear, layer: int) -> torch.Tensor:
    """Logits, and states with the same weight."""
    logits, inside = divergence(mine.logits, theirs.logits, 1), states(mine, theirs, lift, layer)
    return logits + (logits / inside.clamp(min=1e-4)).detach() * inside


def ways() -> dict[str, Callable[[Made, Made, torch.nn.Linear], torch.Tensor]]:
    """Losses of a student's and a teacher's output; the student's ``loss`` is its cross-entropy."""
    return {
        "text": lambda mine, _theirs, _lift: mine.loss,
        **{
            f"logits, temperature {tau}": lambda mine, theirs, _lift, tau=tau: divergence(
                mine.logits, theirs.logits, tau
            )
            for tau in (0.5, 1, 2, 3, 5, 10)
        },
        "logits and text": lambda mine, theirs, _lift: (
            mine.loss + divergence(mine.logits, theirs.logits, 1)
        ),
        **{
            f"logits and states, layer {layer}": partial(with_states, layer=layer)
            for layer in (-3, -2, -1)
        },
    }


def main() -> None:
    """Prints the losses after training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--depth", action="store_true")
    parser.add_argument("--without", default="--", help="leaves out what has this in its name")
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    calibration, held_out, taught = texts(args.text, tokenizer, BATCH * args.steps)
    found = choices(teacher, calibration)
    keep = found["depth, by block influence" if args.depth else "width, by activations"]()
    pruned = cut(teacher, keep)
    print(f"teacher {loss(teacher, held_out):.4f}, pruned {loss(pruned, held_out):.4f}", flush=True)
    lift = torch.nn.Linear(pruned.config.hidden_size, teacher.config.hidden_size, bias=False)
    # each channel goes to where it came from
    lift.weight.data = torch.eye(teacher.config.hidden_size)[:, [*keep.hidden]]
    for name, way in ways().items():
        if args.without in name:
            continue
        student, own = copy.deepcopy(pruned).train(), copy.deepcopy(lift)
        for batch in scheduled([*student.parameters(), *own.parameters()], taught, 2e-3):
            with torch.no_grad():
                theirs = teacher(batch, output_hidden_states=True)
            mine = student(batch, labels=batch, output_hidden_states=True)
            way(mine, theirs, own).backward()
        print(f"{name:<24} held-out loss {loss(student, held_out):.4f}", flush=True)


if __name__ == "__main__":
    main()
