"""metrics.jsonl: the log of a training, one JSON object per line."""

import csv
from pathlib import Path
from typing import Any, TypedDict

from nemo_minitron.workspace.layout import METRICS
from nemo_minitron.workspace.typed_json import read_json, read_lines

FILE = METRICS
TABLE = "metrics.csv"
TEACHERS = "teachers.json"
"""Beside the log of a distillation with a live teacher: [{"step": .., "snapshot": ..}, ...], which snapshot
teaches from which step on (0-based)."""

STOPPED = "stopped.json"
"""Beside the log of a training that ended before ``trainer.max_steps``: {"step": .., "reason": ..}."""


KEPT = "kept.json"
"""Beside the log of a training that kept its best weights: {"step": .., "measure": .., "value": ..}."""


class _Values(TypedDict, total=False):
    tokens: int
    loss: float
    val_loss: float
    divergence: float
    val_divergence: float


class _Line(_Values):
    step: int


class Stop(TypedDict):
    """Where a training ended before its last step, and by what."""

    step: int
    reason: str


class Kept(TypedDict):
    """Which validation's weights became the result of a training."""

    step: int
    measure: str
    value: float


def read_kept(folder: Path) -> Kept | None:
    """Which weights of the training in a folder were kept; None: the last."""
    path = folder / KEPT
    found: Kept | None = read_json(path, Kept) if path.is_file() else None
    return found


def read_stop(folder: Path) -> Stop | None:
    """Where the training in a folder ended early; None: it took all of its steps."""
    path = folder / STOPPED
    found: Stop | None = read_json(path, Stop) if path.is_file() else None
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a training log, in order.

    None where there is no file. A line cut off by a kill is left out, and so is a damaged one, with
    a note.
    """
    return read_lines(path, _Line)


def write_csv(lines: list[dict[str, Any]], path: Path) -> None:
    """The same as a table: a column for every name, empty where a line does not have it."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
