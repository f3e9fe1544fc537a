"""Candidates of one budget: does the rank before training tell the rank after it?

Protocol: eight sizes with half the teacher's parameters (to 5 %), spread evenly over all that the search's own grid
finds, are cut and distilled on the same samples. Measured: Spearman's rank correlation of their losses at every
validation with those at the end; the step from which on it stays above 0.9.
Claim: [P1] section 4.3 and figure 9: ranks move a lot in the first 300 steps, then settle.
"""

from collections.abc import Iterator
from typing import Any

from scipy.stats import spearmanr

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.size_search import candidates, default_choices

TITLE = "Candidates of a search: when ranks settle"
_COUNT, _TOLERANCE, _SHARE = 8, 0.05, 0.5
CLAIMS = (
    Claim("Ranks halfway through a short distillation are nearer to the final ones than ranks right after the cut",
          "[P1] section 4.3: zero-shot rank is not final rank; ranks settle after about 300 steps",
          "halfway", ("before training",), "correlation", higher=True),
    Claim("The best after training is better than the best by size alone (first of the grid)",
          "[P1] section 4.3", "chosen after training", ("nearest to the budget",)),
)  # fmt: skip


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    model = open_checkpoint(lab.teacher()).architecture
    budget = model_size(model).parameters * _SHARE
    found = candidates(
        model,
        default_choices(model, _SHARE),
        round(budget * (1 - _TOLERANCE)),
        round(budget * (1 + _TOLERANCE)),
    )
    chosen = found[:: max(1, len(found) // _COUNT)][:_COUNT]
    rows = []
    for number, one in enumerate(chosen):
        sizes = {
            axis: size
            for axis, size in one.sizes.items()
            if axis in ("hidden", "ffn", "heads", "layers")
        }
        row = lab.before_and_after(Model(to(sizes), steps=lab.profile.steps))
        rows.append(row)
        yield f"candidate {number + 1}", {**row, "sizes": sizes}
    yield from summary(rows)


def summary(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Correlations of ranks, and what choosing late is worth."""
    final = [row["loss"] for row in rows]
    along = [[row["pruned"], *(loss for _, loss in row["curve"])] for row in rows]
    points = [0, *(step for step, _ in rows[0]["curve"])]
    by_point = [float(spearmanr(losses, final).statistic) for losses in zip(*along, strict=True)]
    settled = next(s for i, s in enumerate(points) if all(rho > 0.9 for rho in by_point[i:]))
    yield "before training", {"correlation": by_point[0]}
    yield "halfway", {"correlation": by_point[len(by_point) // 2]}
    yield (
        "settled",
        {"step": settled, "correlations": [list(p) for p in zip(points, by_point, strict=True)]},
    )
    yield "chosen after training", {"loss": min(final)}
    yield (
        "chosen before training",
        {"loss": final[min(range(len(rows)), key=lambda i: rows[i]["pruned"])]},
    )
    yield "nearest to the budget", {"loss": final[0]}


def pictures(rows: Any) -> Iterator[tuple[str, Any]]:
    """Losses of all candidates of the first seed."""
    from benchmarks.paper.pictures import curves

    drawn = {name: of[0] for name, of in rows.items() if name.startswith("candidate") and of}
    yield "candidates", curves(drawn, "steps")
