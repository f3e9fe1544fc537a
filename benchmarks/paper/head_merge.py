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
