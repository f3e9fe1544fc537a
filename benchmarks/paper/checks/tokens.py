"""How many tokens a cut saves, in plain torch: ``python -m benchmarks.paper.checks.tokens MODEL TEXT.jsonl``.

MODEL and TEXT: those of benchmarks/paper/checks/width_or_depth.py. The first width of that script learns from the logits for N steps; the
same shape learns the text from random weights for 1, 4, 16 and more times as many. ``--teacher-steps`` trains the teacher on first: what a
student begins with is the teacher's training, so that the factor should grow with it.
"""

import argparse
from pathlib import Path

import transformers

from benchmarks.paper.checks.width_or_depth import BATCH, choices, cut, loss, texts, train
from benchmarks.paper.token_factor import factor


def main() -> None:
    """Prints the student's loss, those from scratch, and the factor between the two around it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--teacher-steps", type=int, default=0)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 4, 16, 40])
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    most = max(args.multiples) * args.steps
    calibration, held_out, more, taught = texts(
        args.text, tokenizer, BATCH * args.teacher_steps, BATCH * most
    )
    if args.teacher_steps:
        train(teacher, more, 3e-3)
    print(f"teacher {loss(teacher, held_out):.4f}", flush=True)
    student = cut(teacher, choices(teacher, calibration)["width, by activations"]())
    train(student, taught[: BATCH * args.steps], 2e-3, teacher.eval())
    reached = loss(student, held_out)
    print(f"student {reached:.4f}", flush=True)
    tried: list[tuple[int, float]] = []
    for multiple in args.multiples:
        scratch = transformers.NemotronForCausalLM(student.config)
        train(scratch, taught[: BATCH * args.steps * multiple], 2e-3)
        tried.append((multiple, loss(scratch, held_out)))
        print(f"from scratch, tokens x {multiple}: {tried[-1][1]:.4f}", flush=True)
        if tried[-1][1] <= reached:
            break
    print(factor(tried, reached))


if __name__ == "__main__":
    main()
