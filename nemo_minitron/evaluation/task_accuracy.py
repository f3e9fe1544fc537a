"""lm-eval: accuracy of a model without some of its layers, which are skipped in place."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config.config import Config
from nemo_minitron.data.documents import documents, plain
from nemo_minitron.data.mixtures import validation_text
from nemo_minitron.evaluation.held_out_tasks import is_made_here, write_held_out_tasks
from nemo_minitron.evaluation.lm_eval import run_task
from nemo_minitron.models.causal_lm import frozen, load_tokenizer
from nemo_minitron.models.layer_control import LayerControl
from nemo_minitron.scoring.batch_size import samples_at_once
from nemo_minitron.scoring.depth import DepthSums
from nemo_minitron.scoring.pass_in_memory import blocks_of

ACCURACIES = ("acc_norm", "acc", "exact_match")
"""Metrics that stand for a task, the first that it has."""


def task_sums(
    config: Config, checkpoint: Checkpoint
) -> Callable[[Any, int, frozenset[int]], DepthSums]:
    """A function that measures the tasks of ``score.tasks`` without blocks of layers.

    Returns:
        Called with rank 0's side of a pass, the layers of a block, and layers that are left out all
        along.
    """

    def measure(lead: Any, length: int, removed: frozenset[int]) -> DepthSums:
        return accuracy_without(
            lead.model(checkpoint.folder, config.score.device), checkpoint, config.score.tasks,
            config.evaluate.task_dir, lambda: plain(documents(validation_text(config))),
            config.score.task_limit, samples_at_once(config.score.batch_size), length, removed,
        )  # fmt: skip

    return measure


def accuracy_without(
    model: Any,
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    task_dir: str | None,
    held_out: Callable[[], Iterable[str]],
    limit: int | None,
    batch_size: int,
    length: int,
    removed: frozenset[int],
) -> DepthSums:
    """Accuracy, the mean over the tasks, of a model whole and without each block of layers.

    Args:
        model: the causal LM.
        checkpoint: where it came from.
        tasks: lm-eval tasks.
        task_dir: folder with own task YAMLs, or None.
        held_out: gives documents for the tasks that are made from held-out text.
        limit: documents per task, or None.
        batch_size: samples per forward pass.
        length: layers in a block.
        removed: layers that are left out all along.

    Raises:
        ValueError: a task that reports no accuracy.
    """
    layers = checkpoint.architecture.sizes["layers"]
    detour = LayerControl(model, checkpoint.family)
    tokenizer = load_tokenizer(checkpoint.folder)
    cached = model.config.use_cache
    model.config.use_cache = (
        False  # a cache counts what its first layer has seen, which may be left out
    )
    with tempfile.TemporaryDirectory() as name, frozen(model), detour.attached():
        if any(map(is_made_here, tasks)):
            write_held_out_tasks(held_out(), Path(name))

        def accuracy(block: Iterable[int]) -> float:
            detour.skip = removed | set(block)
            rows = [
                run_task(model, tokenizer, task, task_dir, Path(name), limit, batch_size)
                for task in tasks
            ]
            return sum(map(_accuracy, tasks, (row.metrics for row in rows))) / len(tasks)

        try:
            total = torch.full((layers - length + 1,), -torch.inf, dtype=torch.float64)
            for block in blocks_of(layers, length, removed):
                total[block[0]] = accuracy(block)
            return DepthSums(total, accuracy(()), 1)
        finally:
            model.config.use_cache = cached


def _accuracy(task: str, numbers: dict[str, float]) -> float:
    for metric in ACCURACIES:
        for name, value in numbers.items():
            if name.partition(" (")[0] == metric:
                return value
    raise ValueError(
        f"score.tasks: {task} reports {', '.join(sorted(numbers))}; expected one of {', '.join(ACCURACIES)}"
    )
