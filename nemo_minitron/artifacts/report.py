"""report.json and its table: the one on the screen, in the report, on the card and in Prefect."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "report.json"
PAGE = "report.html"
NAMES = {"teacher": "teacher", "pruned": "pruned", "student": "distilled", "scratch": "from scratch"}
"""Model of a workspace to what people call it."""


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a workspace.

    Raises:
        ValueError: there is none.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: no report yet; run 'minitron evaluate' first")
    return dict(json.loads(path.read_text(encoding="utf-8")))


class GateError(RuntimeError):
    """The student is too weak to go out; the report says how weak."""


def check_gate(report: Mapping[str, Any], least: float | None) -> None:
    """Holds a report against the quality gate.

    Raises:
        GateError: the student keeps less than ``least`` of the teacher's quality, or no number at all.
    """
    kept = report["models"]["student"]["retention"]
    if least is not None and not kept >= least:  # NaN must not pass
        raise GateError(
            f"evaluate.min_retention: the student keeps {kept:.1%} of the teacher's quality, "
            f"at least {least:.1%} is asked for; not exported (the workspace's {PAGE} has the numbers)"
        )


def task_columns(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(task, metric) of every task result, in order; standard errors left out."""
    found = []
    for row in report["models"].values():
        for task, metrics in row.get("tasks", {}).items():
            for metric in metrics:
                if not metric.endswith("_stderr") and metric != "sample_len" and (task, metric) not in found:
                    found.append((task, metric))
    return found


def columns(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Titles of the table's columns."""
    speed = any("speed" in row for row in report["models"].values())
    timings = ("prefill tok/s", "decode tok/s", "peak MB") if speed else ()
    tasks = tuple(f"{task} {metric}" for task, metric in task_columns(report))
    return ("model", "parameters", "held-out loss", "perplexity", "quality kept", *tasks, *timings)


def table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Rows of the table, as text."""
    rows = []
    for name, row in report["models"].items():
        cells = [
            NAMES[name],
            f"{row['parameters']:,}",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['retention']:.1%}",
        ]
        for task, metric in task_columns(report):
            cells.append(_with_error(row.get("tasks", {}).get(task, {}), metric))
        if "speed" in row:
            speed = row["speed"]
            cells.append(f"{speed['prefill_tokens_per_second']:,.0f}")
            cells.append(f"{speed['decode_tokens_per_second']:,.0f}")
            peak = speed["peak_megabytes"]
            cells.append("–" if peak is None else f"{peak:,.0f}")
        rows.append(tuple(cells))
    return tuple(rows)


def _with_error(metrics: Mapping[str, float], metric: str) -> str:
    if metric not in metrics:
        return "–"
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.3f}" + (f" ± {error:.3f}" if error else "")


def markdown(titles: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join(["---"] + ["---:"] * (len(titles) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
