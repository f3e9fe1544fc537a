"""The quality gate between a report and an export."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEAGE = "minitron.json"
"""Of an export: where it comes from, and what was measured of it."""
GATE_COLUMNS = ("measure", "asked for", "found", "")


class GateError(RuntimeError):
    """The student is too weak to go out.

    Attributes:
        rows: the gate's table: measure, asked for, found, whether it held.
    """

    def __init__(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        failed = "; ".join(
            f"{name}: {found}, asked for {asked}" for name, asked, found, held in rows if not held
        )
        super().__init__(
            f"the quality gate failed, nothing is exported: {failed} (report.html has the numbers)"
        )
        self.rows = tuple(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return GateError, (self.rows,)


@dataclass(frozen=True)
class Gate:
    """What a student must keep.

    Attributes:
        min_retention: least share of the teacher's quality (perplexity ratio), or None.
        floors: task, metric, and the value that it must reach (or stay under, where less is better).
        previous: what was measured of an earlier export, or None.
        max_regression: the largest relative worsening against it.
    """

    min_retention: float | None = None
    floors: tuple[tuple[str, str, float], ...] = ()
    previous: Mapping[str, Any] | None = None
    max_regression: float = 0.0

    def rows(self, report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
        """The gate's table: measure, asked for, found, and ``held`` or nothing.

        Raises:
            ValueError: a floor for what was not measured, or a previous export that was measured otherwise
                or in more tasks.
        """
        student = report["models"]["student"]
        rows = []
        if self.min_retention is not None:
            kept = student["retention"]
            # NaN must not pass
            rows.append(
                _row("quality kept", ">= {:.1%}", self.min_retention, kept, kept >= self.min_retention)
            )
        for task, metric, least in self.floors:
            value = student.get("tasks", {}).get(task, {}).get(metric)
            if value is None:
                raise ValueError(f"evaluate.floors: {task}:{metric} was not measured (evaluate.tasks)")
            higher = report["better"][task][metric]
            sign = ">= {:.4g}" if higher else "<= {:.4g}"
            held = value >= least if higher else value <= least
            rows.append(_row(f"{task} {metric}", sign, least, value, held))
        if self.previous is not None:
            rows += self._against(report, self.previous)
        return rows

    def _against(
        self, report: Mapping[str, Any], previous: Mapping[str, Any]
    ) -> list[tuple[str, str, str, str]]:
        student = report["models"]["student"]
        if previous["measured_on"] != report["measured_on"]:
            raise ValueError(
                "evaluate.previous: was measured on other text or with other limits; nothing can be compared"
            )
        most = previous["student"]["perplexity"] * (1 + self.max_regression)
        value = student["perplexity"]
        rows = [_row("perplexity against the previous export", "<= {:.4g}", most, value, value <= most)]
        for task, metrics in previous["student"].get("tasks", {}).items():
            if task not in student.get("tasks", {}):
                raise ValueError(
                    f"evaluate.previous: {task} was measured of it and is not measured now (evaluate.tasks)"
                )
            for metric, old in metrics.items():
                new = student.get("tasks", {}).get(task, {}).get(metric)
                if metric.endswith("_stderr") or new is None or metric not in report["better"].get(task, {}):
                    continue
                higher, slack = report["better"][task][metric], abs(old) * self.max_regression
                bound = old - slack if higher else old + slack
                held = new >= bound if higher else new <= bound
                sign = ">= {:.4g}" if higher else "<= {:.4g}"
                rows.append(_row(f"{task} {metric} against the previous export", sign, bound, new, held))
        return rows

    def check(self, report: Mapping[str, Any]) -> None:
        """Holds a report against the gate.

        Raises:
            GateError: it fails.
            ValueError: see ``rows``.
        """
        rows = self.rows(report)
        if not all(held for *_, held in rows):
            raise GateError(rows)


def _row(name: str, asked: str, bound: float, found: float, held: bool) -> tuple[str, str, str, str]:
    shown = f"{found:.1%}" if "%" in asked else f"{found:.4g}"
    return name, asked.format(bound), shown, "held" if held else ""


def measured_of(export: Path) -> dict[str, Any]:
    """What was measured of an earlier export.

    Raises:
        ValueError: it is none, or was made by a version that did not write it down.
    """
    path = export / LINEAGE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "results" not in found:
        raise ValueError(f"evaluate.previous: {path} holds no results; name the folder of an export")
    return dict(found["results"])
