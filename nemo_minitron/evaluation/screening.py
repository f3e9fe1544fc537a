"""Candidates as they are cut, measured in memory: held-out loss, and lm-eval tasks with few documents.

Each measurement is kept under the key of all that decides it: what a killed search has measured, the next
one reads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.workspace.results import Results
from nemo_minitron.workspace.typed_json import read_json

FILE = "screen.json"
LOSS = "loss"
_FIRST = ("acc_norm", "acc", "exact_match,none", "exact_match")
"""Metrics of a task that decide where none is named, in this order; else its first."""


@dataclass(frozen=True)
class Screened:
    """One candidate.

    Attributes:
        sizes: the axes that were asked for or that change.
        layers: 0-based layers that stay.
        costs: measure to cost.
        loss: held-out loss, nats per token; None: it is no number.
        tasks: task to its metrics.
        judged: what decides, less is better; None: it is no number.
    """

    sizes: dict[str, int]
    layers: list[int]
    costs: dict[str, float]
    loss: float | None
    tasks: dict[str, dict[str, float]]
    judged: float | None

    @property
    def name(self) -> str:
        """Its name, made of its sizes."""
        return "-".join(f"{axis}{size}" for axis, size in self.sizes.items())


@dataclass(frozen=True)
class Screen:
    """What a screening found.

    Attributes:
        metric: what decides.
        source: costs of the source.
        limits: measure to least and most allowed.
        sizes_possible, sizes_within, sizes_on_front: how many combinations the family allows, how
            many keep the limits, and how many of these could not keep more.
        machine: whose times the latency is of; empty: latency is no cost.
        chosen: numbers of the candidates to distil, the best first.
        candidates: all that were measured, the best first.
    """

    metric: str
    source: dict[str, float]
    limits: dict[str, tuple[float, float]]
    sizes_possible: int
    sizes_within: int
    sizes_on_front: int
    machine: str
    chosen: list[int]
    candidates: list[Screened]


def read_screen(folder: Path) -> Screen:
    """Reads what the stage wrote.

    Raises:
        ValueError: the file is damaged.
    """
    found: Screen = read_json(folder / FILE, Screen)
    return found


def split_metric(metric: str) -> tuple[str, str | None]:
    """``plan.budget.metric`` to the task, or ``LOSS``, and the task's metric, where it is named."""
    task, _, named = metric.partition(":")
    return task, named or None


def value_of(
    metric: str, loss: float, tasks: Mapping[str, Mapping[str, float]], better: Mapping[str, Any]
) -> float:
    """What a metric says of a model, less is better.

    Args:
        metric: as in ``plan.budget.metric``.
        loss: the held-out loss.
        tasks: task to its metrics.
        better: task to whether more of each metric is better.

    Raises:
        ValueError: the task has no such metric.
    """
    task, named = split_metric(metric)
    if task == LOSS:
        return loss
    values = tasks[task]
    measured = [name for name in values if not name.endswith("_stderr")]
    if named is None:
        named = next((name for name in _FIRST if name in values), measured[0])
    if named not in values:
        raise ValueError(
            f"plan.budget.metric: {task} has no metric {named!r}; it has {', '.join(measured)}"
        )
    return -values[named] if better[task][named] else values[named]


@dataclass
class Screener:
    """Measures candidates of one teacher.

    Attributes:
        checkpoint: the teacher.
        ranking: reads its importance scores, axis name to scores.
        samples: makes the held-out samples, Tensor of shape [samples, positions + 1].
        key: all that decides a measurement beside the candidate.
        results: where measurements are kept.
        tasks: task to the fingerprint of what it is; measured with ``task_limit`` documents.
        task_dir, held_out, task_limit: as in ``run_task``.
        batch_size, device: as in ``evaluate``.
        head_merge: as in ``plan``.
    """

    checkpoint: Checkpoint
    ranking: Callable[[], Mapping[str, Any]]
    samples: Callable[[], Any]
    key: Mapping[str, Any]
    results: Results
    tasks: Mapping[str, Any]
    task_dir: str | None
    held_out: Path
    task_limit: int
    batch_size: int
    device: str
    head_merge: str = "none"
    _loaded: dict[str, Any] = field(default_factory=dict)

    def measure(self, sizes: Mapping[str, int], layers: Sequence[int]) -> dict[str, Any]:
        """``loss``, and of each task its ``metrics`` and what is ``better``, unless they are kept already."""
        key = {**self.key, "sizes": dict(sorted(sizes.items())), "layers": list(layers)}
        found = self.results.get(key)
        if found is None:
            found = self._measured(sizes, layers)
            self.results.put(key, found)
        return dict(found)

    def _measured(self, sizes: Mapping[str, int], layers: Sequence[int]) -> dict[str, Any]:
        from nemo_minitron.evaluation.held_out_loss import held_out_loss
        from nemo_minitron.evaluation.lm_eval import run_task
        from nemo_minitron.models.causal_lm import frozen, load_tokenizer

        if "teacher" not in self._loaded:
            self._load()
        with frozen(self._loaded["teacher"].candidate(sizes, layers)) as model:
            loss = held_out_loss(
                model, self.checkpoint.family, self._loaded["samples"], self.batch_size
            )
            tasks = {}
            for name in self.tasks:
                tokenizer = self._loaded.setdefault(
                    "tokenizer", load_tokenizer(self.checkpoint.folder)
                )
                result = run_task(
                    model, tokenizer, name, self.task_dir, self.held_out, self.task_limit,
                    self.batch_size,
                )  # fmt: skip
                fields = asdict(result)
                tasks[name] = {"metrics": fields["metrics"], "better": fields["better"]}
        return {"loss": loss if math.isfinite(loss) else None, "tasks": tasks}

    def _load(self) -> None:
        from nemo_minitron.evaluation.sorted_teacher import SortedTeacher
        from nemo_minitron.models.causal_lm import pick_device

        self._loaded["samples"] = self.samples()
        self._loaded["teacher"] = SortedTeacher(
            self.checkpoint, self.ranking(), "auto", pick_device(self.device), self.head_merge
        )


def screened(
    metric: str,
    sizes: Mapping[str, int],
    layers: Sequence[int],
    costs: Mapping[str, float],
    found: Mapping[str, Any],
) -> Screened:
    """A candidate with what ``Screener.measure`` found of it."""
    tasks = {name: dict(task["metrics"]) for name, task in found["tasks"].items()}
    better = {name: task["better"] for name, task in found["tasks"].items()}
    loss = math.nan if found["loss"] is None else float(found["loss"])
    value = value_of(metric, loss, tasks, better)
    return Screened(
        dict(sizes), list(layers), dict(costs), found["loss"], tasks,
        value if math.isfinite(value) else None,
    )  # fmt: skip
