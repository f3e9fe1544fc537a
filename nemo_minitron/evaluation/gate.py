"""The quality gate between a report and an export."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.config.config import Config
from nemo_minitron.evaluation.report_types import Lineage, Verdict
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import read_manifest, write_json
from nemo_minitron.workspace.typed_json import read_json

LINEAGE = "minitron.json"
"""Of an export: where it comes from, and what was measured of it."""
GATE_COLUMNS = ("measure", "asked for", "found", "")
Row = tuple[str, str, str, str]
"""Of the gate's table: measure, asked for, found, and ``held`` or nothing."""


class GateError(RuntimeError):
    """The student is too weak to be exported.

    Attributes:
        rows: the gate's table: measure, asked for, found, whether it held.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
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
    """Thresholds that a student must meet.

    Attributes:
        min_retention: least perplexity retention (teacher perplexity / student perplexity), or
            None.
        floors: task, metric, and the value that it must reach (or stay under, where less is
            better).
        previous: what was measured of an earlier export, or None.
        max_regression: the largest relative worsening against it.
    """

    min_retention: float | None = None
    floors: tuple[tuple[str, str, float], ...] = ()
    previous: Mapping[str, Any] | None = None
    max_regression: float = 0.0

    @property
    def asks(self) -> bool:
        """Whether any threshold is set."""
        return self.min_retention is not None or bool(self.floors) or self.previous is not None

    def rows(self, report: Mapping[str, Any]) -> list[Row]:
        """The gate's table.

        Raises:
            ValueError: a floor for what was not measured, or a previous export that was measured
                otherwise or in more tasks.
        """
        student = report["models"]["student"]
        rows = []
        if self.min_retention is not None:
            kept = student["retention"]
            # NaN must not pass
            rows.append(
                _row(
                    "perplexity retention",
                    ">= {:.1%}",
                    self.min_retention,
                    kept,
                    kept >= self.min_retention,
                )
            )
        for task, metric, least in self.floors:
            value = student.get("tasks", {}).get(task, {}).get(metric)
            if value is None:
                raise ValueError(
                    f"evaluate.floors: {task}:{metric} was not measured (evaluate.tasks)"
                )
            higher = report["better"][task][metric]
            sign = ">= {:.4g}" if higher else "<= {:.4g}"
            held = value >= least if higher else value <= least
            rows.append(_row(f"{task} {metric}", sign, least, value, held))
        if self.previous is not None:
            rows += self._against(report, self.previous)
        return rows

    def _against(self, report: Mapping[str, Any], previous: Mapping[str, Any]) -> list[Row]:
        student = report["models"]["student"]
        ours, theirs = dict(report["measured_on"]), dict(previous["measured_on"])
        own, before = ours.pop("tasks", {}), theirs.pop("tasks", {})
        if ours.pop("asked", None) != theirs.pop("asked", None):
            raise ValueError(
                "evaluate.previous: its tasks were asked otherwise (evaluate.chat, .backend, .repeats); "
                "nothing can be compared"
            )
        others = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if others:
            raise ValueError(
                "evaluate.previous: was measured on other text, with another tokenizer or other limits "
                f"(another {', '.join(others)}); nothing can be compared"
            )
        changed = [name for name in before if name in own and own[name] != before[name]]
        if changed:
            raise ValueError(
                f"evaluate.previous: {changed[0]} was measured of it with other questions or by another "
                "lm-eval; nothing can be compared"
            )
        most = previous["student"]["perplexity"] * (1 + self.max_regression)
        value = student["perplexity"]
        rows = [
            _row("perplexity against the previous export", "<= {:.4g}", most, value, value <= most)
        ]
        for task, metrics in previous["student"].get("tasks", {}).items():
            if task not in student.get("tasks", {}):
                raise ValueError(
                    f"evaluate.previous: {task} was measured of it and is not measured now (evaluate.tasks)"
                )
            for metric, old in metrics.items():
                if metric.endswith("_stderr"):
                    continue
                new = student.get("tasks", {}).get(task, {}).get(metric)
                if new is None:
                    raise ValueError(
                        f"evaluate.previous: {task} {metric} was measured of it and is not measured now"
                    )
                if metric not in report["better"].get(task, {}):
                    continue
                higher, slack = report["better"][task][metric], abs(old) * self.max_regression
                bound = old - slack if higher else old + slack
                held = new >= bound if higher else new <= bound
                sign = ">= {:.4g}" if higher else "<= {:.4g}"
                rows.append(
                    _row(f"{task} {metric} against the previous export", sign, bound, new, held)
                )
        return rows


def raise_if_failed(rows: Sequence[Row]) -> None:
    """Raises ``GateError`` if a row of the gate's table failed.

    Raises:
        GateError: a row is not held.
    """
    if not all(held for *_, held in rows):
        raise GateError(rows)


def _row(name: str, asked: str, bound: float, found: float, held: bool) -> Row:
    shown = f"{found:.1%}" if "%" in asked else f"{found:.4g}"
    return name, asked.format(bound), shown, "held" if held else ""


def measured_of(export: Path) -> dict[str, Any]:
    """The results of an earlier export.

    Raises:
        ValueError: it is none, or was made by a version that did not write it down.
    """
    path = export / LINEAGE
    found = read_json(path, Lineage) if path.is_file() else {}
    if "results" not in found:
        raise ValueError(
            f"evaluate.previous: {path} holds no results; name the folder of an export"
        )
    return dict(found["results"])


JUDGES = ("min_retention", "floors", "previous", "max_regression")
"""Keys of ``evaluate`` that judge what was measured, and do not change it."""


def judge(report_folder: Path, gate: Gate, report: Mapping[str, Any]) -> list[Row]:
    """The gate's table, also written to disk; without thresholds, the last table of this report.

    So that a student that failed does not go out by a command that names no floors.

    Raises:
        ValueError: see ``Gate.rows``.
    """
    manifest, path = read_manifest(report_folder), Workspace(report_folder.parent).verdict
    assert manifest is not None
    this = (manifest.fingerprint, manifest.finished)
    if gate.asks:
        rows = gate.rows(report)
        write_json(path, {"report": this, "rows": rows})
        return rows
    said = read_json(path, Verdict) if path.is_file() else None
    return list(said["rows"]) if said and said["report"] == this else []


def gate_of(config: Config) -> Gate:
    """The quality gate that a configuration describes.

    Raises:
        ValueError: a floor that is none, or a previous export without results.
    """
    settings, floors = config.evaluate, []
    for text in settings.floors:
        try:
            task, metric, least = text.rsplit(":", 2)
            floors.append((task, metric, float(least)))
        except ValueError:
            raise ValueError(
                f"evaluate.floors: expected TASK:METRIC:VALUE, as in hellaswag:acc_norm:0.5, found {text!r}"
            ) from None
    previous = None if settings.previous is None else measured_of(Path(settings.previous))
    return Gate(settings.min_retention, tuple(floors), previous, settings.max_regression)
