"""What a ranking is worth: nine pairs of aggregations, where neurons are read, and the controls.

Protocol: the width cut by each of the nine pairs (over samples / over positions), by magnitude and by chance; the cut of
neurons alone by activations behind the activation function and before it, by magnitude and by chance. Held-out loss
right after the cut, and after a short distillation on the same samples.
Claim: [P1] best practice 2, table 13 (right after the cut), figure 5 (after retraining): l2 over samples with mean over positions; importance beats chance.
The literal reading of [P1] takes neurons before the activation function; ours is behind it.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "Importance: aggregations, neurons, controls"
_PAIRS = [
    (batch, sequence) for batch in ("l2", "mean", "var") for sequence in ("mean", "l2", "var")
]
_OTHERS = tuple(
    f"{batch} / {sequence}" for batch, sequence in _PAIRS if (batch, sequence) != ("l2", "mean")
)
_AGAIN = "[P1] table 13 and figure 5: l2 / mean is best, before and after retraining"
CLAIMS = (
    Claim("l2 over samples with mean over positions is the best of nine pairs, right after the cut", _AGAIN,
          "l2 / mean", _OTHERS, "pruned"),
    Claim("and after retraining", _AGAIN, "l2 / mean", _OTHERS),
    Claim("Activations beat chance, right after the cut", "[P1] section 2.2: units are ranked by activations",
          "l2 / mean", ("random",), "pruned"),
    Claim("and after retraining", "[P1] section 2.2", "l2 / mean", ("random",)),
    Claim("Activations beat weights' magnitude, right after the cut", "[P1] section 2.2", "l2 / mean",
          ("magnitude",), "pruned"),
    Claim("and after retraining", "[P1] section 2.2", "l2 / mean", ("magnitude",)),
    Claim("Neurons read behind the activation function beat those read before it, right after the cut",
          "against the literal [P1] section 2.2; Model-Optimizer reads behind it",
          "neurons, post-activation", ("neurons, pre-activation",), "pruned"),
    Claim("and after retraining", "the same", "neurons, post-activation", ("neurons, pre-activation",)),
    Claim("Neurons by activation beat chance, right after the cut", "[P1] section 2.2", "neurons, post-activation",
          ("neurons, random",), "pruned"),
    Claim("and after retraining", "[P1] section 2.2", "neurons, post-activation", ("neurons, random",)),
)  # fmt: skip


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    width, ffn = to(lab.profile.sizes["width"]), to(lab.profile.sizes["ffn"])
    yield "teacher", lab.measured(Model())
    ways = {
        f"{batch} / {sequence}": (
            *width, f"score.aggregation.batch={batch}", f"score.aggregation.sequence={sequence}"
        )
        for batch, sequence in _PAIRS
    }  # fmt: skip
    ways["l2 / mean"] = width  # the default, shared with other experiments
    ways |= {f"{name}": (*width, f"score.importance={name}") for name in ("magnitude", "random")}
    ways |= {
        "neurons, post-activation": ffn,
        "neurons, pre-activation": (*ffn, "score.neurons=pre_activation"),
        "neurons, magnitude": (*ffn, "score.importance=magnitude"),
        "neurons, random": (*ffn, "score.importance=random"),
    }
    for name, cut in ways.items():
        yield name, lab.before_and_after(Model(cut, steps=lab.profile.short))


def pictures(rows: Any) -> Iterator[tuple[str, Any]]:
    """Loss of each way, before and after."""
    from benchmarks.paper.pictures import before_and_after

    yield "aggregation", before_and_after(rows)
