"""Whether scoring again on the way pays: T = 1, 2, 4 rounds of score and cut.

Protocol: the width cut in T rounds without training between them, then the same short distillation.
Claim: [P1] best practice 3, section 2.2, table 14: iterative importance does not pay. Equal means: within 0.02 nats.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "One shot against iterative importance"
_SAME = "[P1] best practice 3, table 14: no benefit after retraining"
CLAIMS = (
    Claim("Two rounds give the same as one, after retraining (± 0.02)", _SAME, "T = 2", ("T = 1",), margin=0.02),
    Claim("Four rounds give the same as one, after retraining (± 0.02)", _SAME, "T = 4", ("T = 1",), margin=0.02),
)  # fmt: skip


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    for rounds in (1, 2, 4):
        words = () if rounds == 1 else (f"score.iterations={rounds}",)
        cut = (*to(lab.profile.sizes["width"]), *words)
        yield f"T = {rounds}", lab.before_and_after(Model(cut, steps=lab.profile.short))
