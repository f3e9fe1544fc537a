"""Top-k with the rest and without it, in plain torch: ``python -m benchmarks.paper.checks.topk_tail TEACHER STUDENT TEXT.jsonl``.

TEACHER and STUDENT: Hugging Face folders of one tokenizer; the student a pruned model, before it was trained. Three students
learn on the same batches: from all entries, from the teacher's top k with one bucket for the rest, and from the top k
renormalised on both sides. Said first: what each loss is where the student moves its mass to the tail.
"""

import sys
from pathlib import Path

import torch
import transformers

from benchmarks.paper.checks.rankings import windows

STEPS, BATCH, RATE, HELD_OUT = 60, 16, 2e-3, 256


def divergence(student: torch.Tensor, teacher: torch.Tensor, k: int, bucket: bool) -> torch.Tensor:
    """KL of the teacher to the student over the teacher's top k; k = 0: over all."""
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    if k:
        top = p.topk(k, -1).indices
        q, p = q.gather(-1, top), p.gather(-1, top)
        if bucket:
            q, p = (
                torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log()], -1)
                for x in (q, p)
            )
        else:
            q, p = q.log_softmax(-1), p.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def main() -> None:
    """Prints the losses."""
    teacher = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    moved = torch.tensor([[4.0, 3.0, 9.0, 9.0, 9.0, 9.0]])  # the same two entries, nearly no mass
    for name, k, bucket in (
        ("all", 0, True),
        ("top 2 and the rest", 2, True),
        ("top 2 alone", 2, False),
    ):
        print(f"mass moved to the tail, {name}: {float(divergence(moved, teacher, k, bucket)):.4f}")
    folders, text = [Path(name) for name in sys.argv[1:3]], Path(sys.argv[3])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    samples = windows(text, tokenizer, STEPS * BATCH + HELD_OUT)
    held_out, train = samples[:HELD_OUT], samples[HELD_OUT:]
    source = transformers.AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    for name, k, bucket in (
        ("all", 0, True), ("top 10 and the rest", 10, True), ("top 10 alone", 10, False),
        ("top 100 and the rest", 100, True), ("top 100 alone", 100, False),
    ):  # fmt: skip
        student = transformers.AutoModelForCausalLM.from_pretrained(folders[1]).train()
        optimiser = torch.optim.AdamW(
            student.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1
        )
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, RATE, total_steps=STEPS, pct_start=0.2
        )
        for batch in train.split(BATCH):
            with torch.no_grad():
                taught = source(batch[:, :-1]).logits
            divergence(student(batch[:, :-1]).logits, taught, k, bucket).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
            rates.step()
            optimiser.zero_grad()
        with torch.no_grad():
            print(
                f"{name:<22} held-out loss {float(student.eval()(held_out, labels=held_out).loss):.4f}"
            )


if __name__ == "__main__":
    main()
