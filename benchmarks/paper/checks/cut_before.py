"""Cut before teacher correction or behind it, in plain torch: ``python -m benchmarks.paper.checks.cut_before MODEL HEADERS.jsonl``.

MODEL: the Nemotron of benchmarks/paper/checks/width_or_depth.py, trained on Python; HEADERS: runs/paper/corpus/headers.jsonl. The
teacher learns the headers for 100 steps. Of the teacher as it was and of the corrected one the first width of that script is cut,
by activations on headers; the corrected one teaches both, for each of several lengths. If the order of benchmarks/paper/correction.py
is one of short trainings, the gap closes.
"""

import argparse
import copy
from pathlib import Path

import transformers

from benchmarks.paper.checks.width_or_depth import BATCH, choices, cut, loss, texts, train

CORRECTION = 100


def main() -> None:
    """Prints the losses of both, before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[120, 480])
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    used = BATCH * CORRECTION, BATCH * max(args.steps)
    calibration, held_out, own, taught = texts(args.text, tokenizer, *used)
    corrected = copy.deepcopy(teacher)
    train(corrected, own, 6e-4)
    print(
        f"teacher {loss(teacher, held_out):.4f}, corrected {loss(corrected, held_out):.4f}",
        flush=True,
    )
    for steps in args.steps:
        for name, source in (("as it was", teacher), ("corrected", corrected)):
            student = cut(source, choices(source, calibration)["width, by activations"]())
            before = loss(student, held_out)
            train(student, taught[: BATCH * steps], 2e-3, corrected)
            after = loss(student, held_out)
            print(
                f"{steps} steps, cut {name:<10} {before:.4f}, after training {after:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
