"""Blocks of layers to measure, their importance by task accuracy, and greedy removal ([P2] section 3)."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config.config import Config
from nemo_minitron.pruning.select import least
from nemo_minitron.scoring.depth import DepthSums, block_importance
from nemo_minitron.scoring.pass_runner import Runner
from nemo_minitron.scoring.scores_file import Scores

if TYPE_CHECKING:
    from nemo_minitron.scoring.distributed_pass import Leader

TaskSums = Callable[["Leader", int, frozenset[int]], DepthSums]
"""Accuracy without each block of so many layers, where some layers are left out all along."""


def block_lengths(config: Config, layers: int) -> tuple[int, ...]:
    """Lengths of the blocks of layers that are measured, single layers first.

    Raises:
        ValueError: a length that no block can have.
    """
    lengths = {1, *config.score.blocks}
    if config.plan.layer_choice == "contiguous" and config.plan.layers is not None:
        lengths.add(layers - config.plan.layers)
    wrong = [length for length in config.score.blocks if not 1 <= length < layers]
    if wrong:
        raise ValueError(f"score.blocks: expected lengths of 1 to {layers - 1}, found {wrong[0]}")
    return tuple(sorted(length for length in lengths if 1 <= length < layers))


def greedy_steps(config: Config, layers: int) -> int:
    """How many layers greedy removal removes."""
    asked = config.plan.layer_choice == "greedy" and config.plan.layers is not None
    return layers - (config.plan.layers or 0) if asked else 0


def greedy(
    config: Config,
    run: Runner,
    checkpoint: Checkpoint,
    scores: Scores,
    indices: list[int],
    steps: int,
    tasks: TaskSums,
) -> tuple[int, ...]:
    """Removes the least important layer, measures the others again, and repeats ([P1] A.5).

    Raises:
        ValueError: the importance of a layer that is left is not finite.
    """
    from nemo_minitron.scoring.hooks import Measures

    metric = config.score.depth
    importance = scores.ranking["layers"]
    order: list[int] = []
    measures = Measures(
        (), False, (1,) if metric == "block_influence" else (), (1,) if metric == "lm_loss" else ()
    )
    while True:
        order.append(least(importance, order))
        if len(order) == steps:
            return tuple(order)
        if metric == "task":
            importance = block_importance("task", tasks(run.lead, 1, frozenset(order)))
        else:
            calibration = run(checkpoint.folder, measures, indices, frozenset(order), save=False)
            importance = block_importance(metric, calibration.depth[metric, 1])


def with_tasks(
    config: Config, lead: "Leader", checkpoint: Checkpoint, scores: Scores, tasks: TaskSums
) -> Scores:
    """Ranks layers, and blocks of them, by a task's accuracy without them ([P2] section 3)."""
    layers = checkpoint.architecture.sizes["layers"]
    depth: dict[tuple[str, int], DepthSums] = dict(scores.calibration.depth)
    for length in block_lengths(config, layers):
        depth["task", length] = tasks(lead, length, frozenset())
    ranking = {**scores.ranking, "layers": block_importance("task", depth["task", 1])}
    return Scores(ranking, replace(scores.calibration, depth=depth))
