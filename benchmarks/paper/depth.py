"""Which layers go: block influence, the loss without them, a task without them; scattered or in a block.

Protocol: half the layers by each measure and choice, by magnitude and by chance. Held-out loss and the right answers to a
multiple choice made from held-out text (the measure ``task`` uses other questions of the same kind), before and after
a short distillation.
Claims: [P2] section 3: block influence underperforms the loss without a layer; contiguous blocks keep a task's accuracy
where scattered removal keeps only the loss. [P1] A.5: greedy re-scoring.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim

TITLE = "Depth: measures and choices"
_CLAIM = "[P2] section 3"
CLAIMS = (
    Claim("The loss without a layer is a better measure than block influence, right after the cut", _CLAIM,
          "lm_loss, scattered", ("block influence, scattered",), "pruned"),
    Claim("and after retraining", _CLAIM, "lm_loss, scattered", ("block influence, scattered",)),
    Claim("Scattered removal keeps the loss better than a contiguous block, right after the cut", _CLAIM,
          "lm_loss, scattered", ("lm_loss, contiguous",), "pruned"),
    Claim("A contiguous block keeps the task better than scattered removal, right after the cut",
          "[P2] section 3: Winogrande .595 against .5", "task, contiguous", ("lm_loss, scattered",),
          "pruned_accuracy", higher=True),
    Claim("Scoring anew after each layer (greedy) is better, right after the cut", "[P1] A.5, without retraining",
          "lm_loss, greedy", ("lm_loss, scattered",), "pruned"),
    Claim("Block influence beats chance, right after the cut", "[P1] section 2.2", "block influence, scattered",
          ("random",), "pruned"),
)  # fmt: skip


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    cut = to(lab.profile.sizes["depth"])
    task = (
        "score.depth=task",
        "score.tasks=[held_out_choice]",
        f"score.task_limit={lab.profile.questions // 2}",
    )
    block = "plan.layer_choice=contiguous"
    ways: dict[str, tuple[str, ...]] = {
        "block influence, scattered": cut,
        "block influence, contiguous": (*cut, block),
        "lm_loss, scattered": (*cut, "score.depth=lm_loss"),
        "lm_loss, contiguous": (*cut, "score.depth=lm_loss", block),
        "lm_loss, greedy": (*cut, "score.depth=lm_loss", "plan.layer_choice=greedy"),
        "task, scattered": (*cut, *task),
        "task, contiguous": (*cut, *task, block),
        "magnitude": (*cut, "score.importance=magnitude"),
        "random": (*cut, "score.importance=random"),
    }
    yield "teacher", lab.measured(Model(), accuracy=True)
    for name, words in ways.items():
        yield name, lab.before_and_after(Model(words, steps=lab.profile.short), accuracy=True)


def pictures(rows: Any) -> Iterator[tuple[str, Any]]:
    """Loss of each way, before and after."""
    from benchmarks.paper.pictures import before_and_after

    yield "depth", before_and_after(rows)
