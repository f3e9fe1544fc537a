"""metrics.jsonl: the log of a training, one JSON object per line."""

import csv
import json
from pathlib import Path
from typing import Any

from nemo_minitron.workspace.layout import METRICS

FILE = METRICS
TABLE = "metrics.csv"
TEACHERS = "teachers.json"
"""Beside the log of a distillation with a live teacher: [{"step": .., "snapshot": ..}, ...], which snapshot
teaches from which step on (0-based)."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a training log, in order.

    None where there is no file, and a line cut off by a kill is left out.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def write_csv(lines: list[dict[str, Any]], path: Path) -> None:
    """The same as a table: a column for every name, empty where a line does not have it."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
