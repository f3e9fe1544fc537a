"""Where a small model begins: pruned in width, in depth, in both, or from random weights.

Protocol: half the parameters in three shapes of equal size (to a percent), each cut by activations (width) and block
influence (depth), each trained on the same samples in the same order. Pruned models learn from the teacher's logits. From
random weights: with the logits (the shape of the width cut), and as usual, with cross-entropy (all shapes). Measured:
held-out loss before and along the training, and the right answers to a multiple choice made from held-out text.
[P1] tables 10 and 11, figure 6, best practice 4.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "Where to begin: width, depth, both, or random weights"
_SHAPES = ("width", "depth", "both")
CLAIMS = (
    Claim("Pruned and distilled beats the same shape trained from scratch on the same tokens",
          "[P1] table 11: 4B, MMLU 42.45 against 24.36 (random start, same compute)",
          "width, pruned", ("width, from scratch",)),
    Claim("It also beats random weights that learn from the teacher",
          "[P1] table 11: pruned against random start",
          "width, pruned", ("width, random start, logits",)),
    Claim("In downstream accuracy, too: up to 16 % better than from scratch",
          "model card: 16 % in MMLU (63.8 against 54.7)",
          "width, pruned", ("width, from scratch",), "accuracy", higher=True),
    Claim("Width beats depth after retraining", "[P1] best practice 4, table 10, figure 6",
          "width, pruned", ("depth, pruned",)),
    Claim("Before retraining depth is ahead, so that the curves cross", "[P1] figure 6: after about 200 steps",
          "depth, pruned", ("width, pruned",), "pruned"),
    Claim("Width alone beats both axes at once", "[P1] table 10, figure 6", "width, pruned", ("both, pruned",)),
)  # fmt: skip


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    sizes, steps = lab.profile.sizes, lab.profile.steps
    yield "teacher", lab.measured(Model(), accuracy=True)
    for shape in _SHAPES:
        cut = to(sizes[shape])
        yield f"{shape}, pruned", lab.before_and_after(Model(cut, steps=steps), accuracy=True)
        yield (
            f"{shape}, from scratch",
            lab.measured(Model(cut, steps=steps, scratch=True), accuracy=True),
        )
    cut = to(sizes["width"])
    noise = Model(cut, steps=1, scratch=True)
    yield (
        "width, random start, logits",
        lab.before_and_after(Model(cut, steps=steps, of=noise, taught_by=Model())),
    )


def pictures(rows: Any) -> Iterator[tuple[str, Any]]:
    """Loss along the training, of the first seed."""
    from benchmarks.paper.pictures import curves

    whole = rows["teacher"][0]["loss"]
    drawn = {name: of[0] for name, of in rows.items() if of and "curve" in of[0]}
    pruned = {name: row for name, row in drawn.items() if "pruned" in name}
    yield "start", curves(drawn, "steps", f"teacher {whole:.3f}", whole)
    yield "start-pruned", curves(pruned, "steps", f"teacher {whole:.3f}", whole)
