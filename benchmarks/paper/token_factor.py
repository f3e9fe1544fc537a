"""How many tokens pruning saves.

Protocol: the width cut is distilled for N steps. The same shape is trained from scratch on 1, 4, 16 and 40 times as many
tokens, each with a whole schedule of its own, until one reaches the student's held-out loss; the factor is read off
between the two around it (loss against log of tokens; of an unreached one the largest tried counts, as a lower bound).
Beside equal tokens: equal compute (a distilled token costs the teacher's forward pass, too), and the compute of the whole
pipeline, the teacher's own training included, all spent on training from scratch. FLOPs are those of our counter.
Claim: [P1] abstract and section 4: up to 40 times fewer tokens (3.8 T / 94 B); arXiv 2606.14150: with the whole
pipeline's budget training from scratch can match it.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "Token factor"
_MULTIPLES = (1, 4, 16, 40)
CLAIMS = (
    Claim("Fewer tokens than from scratch (factor above 1)", "[P1]: yes", "factor", (), "factor", True, least=1.0),
    Claim("40 times fewer tokens", "model card: up to 40 (3.8 T / 94 B = 40.4)", "factor", (), "factor", True,
          least=40.0),
    Claim("Better than from scratch at equal tokens", "[P1] table 11", "student", ("from scratch, tokens x 1",)),
    Claim("Better than from scratch at equal compute", "–", "student", ("from scratch, equal compute",)),
    Claim("Better than from scratch at the whole pipeline's compute", "2606.14150: not necessarily",
          "student", ("from scratch, whole pipeline's compute",)),
)  # fmt: skip

NOTE = """Plain torch finds 8.1 for the first teacher (`benchmarks/paper/checks/tokens.py`: student 3.613; from scratch 5.253, 4.088 and 3.152 with 1, 4 and 16 times the tokens). What a
student begins with is its teacher's training, here ten times the student's tokens, so that 40 is out of reach: the same teacher trained on for
1,800 steps (2.477; student 2.986) gives 20.4. Nemotron-4 15B was trained on 85 times the tokens of its students. For the same reason the whole pipeline's compute is better spent on the small model
alone where nobody has the teacher yet; the paper's claim is about one that is there."""


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    steps, cut = lab.profile.short, to(lab.profile.sizes["width"])
    student = lab.measured(Model(cut, steps=steps))
    teacher = lab.measured(Model())
    yield "student", student
    tried: list[tuple[int, float]] = []
    for multiple in _MULTIPLES:
        if multiple > lab.profile.most or (tried and tried[-1][1] <= student["loss"]):
            break
        found = lab.measured(Model(cut, steps=multiple * steps, scratch=True))
        tried.append((multiple, found["loss"]))
        yield f"from scratch, tokens x {multiple}", found
    yield "factor", {**factor(tried, student["loss"])}
    ours, theirs = student["flops_per_token"], teacher["flops_per_token"]
    kd = steps * (1 + theirs / (3 * ours))
    trained = next(
        int(word.split("=")[1])
        for word in reversed(lab.profile.words)
        if word.startswith("pretrain.trainer.max_steps=")
    )
    for name, budget in (
        ("equal compute", kd),
        ("whole pipeline's compute", kd + trained * theirs / ours),
    ):
        yield f"from scratch, {name}", lab.measured(Model(cut, steps=round(budget), scratch=True))


def factor(tried: list[tuple[int, float]], loss: float) -> dict[str, float]:
    """The multiple of tokens at which a loss is reached.

    Args:
        tried: multiples and their losses, ascending.
        loss: the student's.

    Returns:
        ``factor``, and ``reached`` (0: it is a lower bound).
    """
    for (low, above), (high, below) in itertools.pairwise(tried):
        if below <= loss < above:
            share = (above - loss) / (above - below)
            return {
                "factor": math.exp(math.log(low) + share * math.log(high / low)),
                "reached": 1.0,
            }
    reached = tried[0][1] <= loss
    return {"factor": float(tried[0][0] if reached else tried[-1][0]), "reached": float(reached)}


def pictures(rows: Any) -> Iterator[tuple[str, Any]]:
    """Loss against the multiple of tokens, each seed's student as a line."""
    from benchmarks.paper.pictures import against_tokens

    yield "token_factor", against_tokens(rows, _MULTIPLES)
