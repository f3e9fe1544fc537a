"""In one cut or in two: 100 % -> 25 % against 100 % -> 50 % -> 25 %, on the same tokens.

Protocol: at once with N steps of distillation; in two cuts with N / 2 steps each, where the second student learns from
the first teacher or from the model in between. Held-out loss at the end.
Claims: [P1] table 11, SlimQwen (arXiv 2605.08738): progressive beats one shot at equal tokens. [P1]: the smallest of the
family, cut from the middle one, learns better from the largest.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "In one cut or in two"
CLAIMS = (
    Claim("Two cuts beat one at equal tokens", "[P1] table 11: 15B to 8B to 4B; arXiv 2605.08738", "in two cuts, taught by the first",
          ("in one cut",)),
    Claim("The first teacher is better than the model in between", "[P1]: for the 4B the 15B is better than the 8B",
          "in two cuts, taught by the first", ("in two cuts, taught by the middle",)),
)  # fmt: skip

NOTE = """Plain torch says the same of the first teacher (`benchmarks/paper/checks/two_cuts.py`): after 120 steps one cut 3.766, two cuts 3.839 taught by the first and
3.863 by the middle model; after 480 steps 3.569, 3.596 and 3.602. The gap closes with the length of the training: the second cut undoes a part of what the first
half has repaired, and so short a half does not repair it. [P1] trains on some ninety billion tokens after each cut."""


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    steps, quarter = lab.profile.steps, to(lab.profile.sizes["quarter"])
    middle = Model(to(lab.profile.sizes["width"]), steps=max(1, steps // 2))
    yield "in one cut", lab.before_and_after(Model(quarter, steps=steps))
    for name, teacher in (("first", Model()), ("middle", middle)):
        yield (
            f"in two cuts, taught by the {name}",
            lab.before_and_after(
                Model(quarter, steps=max(1, steps // 2), of=middle, taught_by=teacher)
            ),
        )
