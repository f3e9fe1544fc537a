"""The quality gate as a configuration describes it, for evaluate and export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.gate import Gate, Row, measured_of
from nemo_minitron.artifacts.manifest import read_manifest, write_json
from nemo_minitron.stages.config import Config

JUDGES = ("min_retention", "floors", "previous", "max_regression")
"""Keys of ``evaluate`` that judge what was measured, and do not change it."""

VERDICT = "gate.json"
"""Beside the report, what the gate said of it last."""


def judge(report_folder: Path, gate: Gate, report: Mapping[str, Any]) -> list[Row]:
    """The gate's table, which is written down; what it said of this report last, where it asks for nothing.

    So that a student that failed does not go out by a command that names no floors.

    Raises:
        ValueError: see ``Gate.rows``.
    """
    manifest, path = read_manifest(report_folder), report_folder.with_name(VERDICT)
    assert manifest is not None
    this = [manifest.fingerprint, manifest.finished]
    if gate.asks:
        rows = gate.rows(report)
        write_json(path, {"report": this, "rows": rows})
        return rows
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return [tuple(row) for row in said["rows"]] if said.get("report") == this else []


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
