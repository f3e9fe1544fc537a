"""Teacher correction, where the text to distil on is not what the teacher was trained on.

Protocol: a teacher of Python meets C++ headers. The width cut is distilled on headers by the teacher as it is, and by the
teacher trained on with headers first (then it is what is cut, too); and the cut of the uncorrected teacher is taught by
the corrected one. Measured on held-out headers.
Claim: [P2] section 2: correction lowers the student's loss by more than 6 %; cutting before or after it
makes no difference.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "Teacher correction"
CLAIMS = (
    Claim("A corrected teacher makes a better student", "[P2] section 2", "corrected", ("as it was",)),
    Claim("by more than 6 % of the loss", "[P2] section 2: more than 6 %", "gain", (), "percent", True, least=6.0),
    Claim("Whether the model is cut before the correction does not matter (± 0.02)", "[P2] section 2",
          "cut before, taught by the corrected", ("corrected",), margin=0.02),
)  # fmt: skip
NOTE = """A cut from before the correction stays behind in plain torch, too (`benchmarks/paper/checks/cut_before.py`, first teacher): after 120 steps 2.532 against
2.457, the corrected teacher 2.402. It begins 1.2 nats higher, for what it is to learn of headers is not in the weights that are cut, and 123
thousand tokens do not make up for it; [P2] trains on a hundred billion. After 480 steps the gap has closed: 2.425 against 2.417."""


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    steps, cut, most = lab.profile.steps, to(lab.profile.sizes["width"]), lab.profile.correction
    corrected = Model(text="headers", corrected=most)
    yield "teacher, as it was", lab.measured(Model(text="headers"))
    yield "teacher, corrected", lab.measured(corrected)
    plain = lab.before_and_after(Model(cut, steps=steps, text="headers"))
    yield "as it was", plain
    better = lab.before_and_after(Model(cut, steps=steps, text="headers", corrected=most))
    yield "corrected", better
    yield (
        "cut before, taught by the corrected",
        lab.before_and_after(Model(cut, steps=steps, text="headers", taught_by=corrected)),
    )
    yield "gain", {"percent": 100 * (plain["loss"] - better["loss"]) / plain["loss"]}
