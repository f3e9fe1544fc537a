"""What becomes of the heads that go: dropped, or merged into those that stay.

Protocol: half the query heads of every KV group, by activations, with each value of ``plan.head_merge``; held-out loss
right after the cut and after a short distillation.
Claim: [P1] section 2.3 adds the difference to the heads that go (``paper``). Heads of one group share their values, so
that summing their output projections (``sum_output``, ``average_query``) comes nearer to what the model computed.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "Merging of query heads"
CLAIMS = (
    Claim("The paper's merging beats dropping, right after the cut", "[P1] section 2.3", "paper", ("none",), "pruned"),
    Claim("and after retraining", "[P1] section 2.3", "paper", ("none",)),
    Claim("Summed output projections beat dropping, right after the cut", "–", "sum_output", ("none",), "pruned"),
    Claim("and after retraining", "–", "sum_output", ("none",)),
    Claim("With averaged queries, too, right after the cut", "–", "average_query", ("none",), "pruned"),
    Claim("and after retraining", "–", "average_query", ("none",)),
)  # fmt: skip
NOTE = """The paper's merging is worse than dropping in plain torch, too (`benchmarks/paper/checks/heads.py`, first teacher): [P1] does not say in
which matrix the difference is added, and in none of them does it help. Teacher 3.471; dropped 3.587 right after the cut and 3.507 after
training; difference in the queries 3.606 and 3.521, in the output projection 3.860 and 3.535, in both 4.052 and 3.557; outputs summed 3.529
and 3.498. So short a training does not make up for it; whether one of billions of tokens does cannot be seen here."""


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed.

    Raises:
        ValueError: this version has no ``plan.head_merge``.
    """
    if not hasattr(lab.measuring().plan, "head_merge"):
        raise ValueError("plan.head_merge: this version of the package has no such key")
    heads = to(lab.profile.sizes["heads"])
    for way in ("none", "paper", "sum_output", "average_query"):
        cut = (*heads, f"plan.head_merge={way}")
        yield way, lab.before_and_after(Model(cut, steps=lab.profile.short))
