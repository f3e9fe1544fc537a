"""report.html: one self-contained page about a workspace, made from its artifacts.

'minitron report' rewrites it.
"""

import json
import sys
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_minitron.evaluation.report import (
    COMPARED,
    NAMES,
    PAGE,
    SPEEDS,
    WRITTEN,
    asked,
    columns,
    compared,
    read_report,
    speeds,
    table,
    title,
    unserved,
    vocabulary_notes,
    written,
)
from nemo_minitron.pruning.plan_file import Plan, read_plan
from nemo_minitron.security.links import leads_out
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace import training_log
from nemo_minitron.workspace.artifacts import artifacts_in
from nemo_minitron.workspace.atomic import replacing
from nemo_minitron.workspace.command_log import commands_in
from nemo_minitron.workspace.layout import Workspace, metrics_in
from nemo_minitron.workspace.manifest import read_manifest
from nemo_minitron.workspace.pictures import inline, pictures_in
from nemo_minitron.workspace.typed_json import read_json

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_page(workspace: Path, folder: Path) -> None:
    """Writes report.html into ``folder``, from the report.json there and the artifacts of the workspace."""
    report = read_report(folder)
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=report["workspace"],
        columns=columns(report),
        rows=table(report),
        asked=asked(report),
        compared_columns=COMPARED,
        compared=compared(report),
        written_columns=WRITTEN,
        written=written(report),
        samples=report["writing"] if "writing" in report else [],
        prompts=report["prompts"] if "prompts" in report else 0,
        names={name: title(name) for name in report["models"]},
        speeds_columns=SPEEDS,
        speeds=speeds(report),
        unserved=unserved(report),
        commands=commands_in(workspace),
        models=report["models"],
        plan=_plan(workspace),
        notes=vocabulary_notes(report),
        curves=_curves(workspace, report),
        task_curves=_task_curves(workspace, report),
        pareto=_pareto(workspace),
        predicted=_predicted(workspace),
        maps=_maps(workspace),
        lineage=_lineage(workspace),
    )
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _plan(workspace: Path) -> Plan | None:
    """What was cut; None if that is not known, or if the workspace now has another plan."""
    plan, pruned = (
        read_manifest(Workspace(workspace).plan),
        read_manifest(Workspace(workspace).pruned),
    )
    if plan is None:
        return None
    used = (
        []
        if pruned is None
        else [item.fingerprint for item in pruned.inputs if item.path == "plan"]
    )
    return None if used and plan.fingerprint not in used else read_plan(Workspace(workspace).plan)


def _curves(workspace: Path, report: dict[str, Any]) -> str | None:
    """The picture of the losses; None where nothing was trained here."""
    from nemo_minitron.evaluation.plots import loss_curves

    logs = _logs(workspace, report)
    if not logs:
        return None
    losses = {name: row.get("own_loss", row["loss"]) for name, row in report["models"].items()}
    return inline(loss_curves(logs, losses))


def _logs(workspace: Path, report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The logs of the models that were trained here."""
    logs = {}
    for name in [name for name in report["models"] if name in NAMES]:
        log = training_log.read_log(metrics_in(Workspace(workspace).artifact(name)))
        lines = [line for line in log if "tokens" in line]
        if lines:
            logs[name] = lines
    return logs


def _task_curves(workspace: Path, report: dict[str, Any]) -> str | None:
    """The picture of the tasks while a model was trained; None where none was measured."""
    from nemo_minitron.evaluation.plots import task_curves

    logs = _logs(workspace, report)
    found = {
        name: None
        for lines in logs.values()
        for line in lines
        for name, value in line.items()
        if ":" in name and not name.endswith("_stderr") and isinstance(value, int | float)
    }
    return inline(task_curves(logs, list(found))) if found else None


def _pareto(workspace: Path) -> str | None:
    """The picture of the sizes that a search or a sweep has tried; None where there was none."""
    path = Workspace(workspace).pareto
    return inline(path.read_bytes()) if path.is_file() and not leads_out(path, workspace) else None


class _Search(TypedDict):
    rank_correlation: NotRequired[list[dict[str, Any]]]


def _predicted(workspace: Path) -> list[tuple[str, str, str, str]]:
    """Whether each round of a search ranked its candidates as the one before; none where none was made."""
    path = Workspace(workspace).search
    if not path.is_file() or leads_out(path, workspace):
        return []
    try:
        found = read_json(path, _Search)
    except ValueError as error:
        print(f"note: {plain(error)}; the report leaves it out", file=sys.stderr)
        return []
    rows = found["rank_correlation"] if "rank_correlation" in found else []
    return [
        (
            str(row["of"]), str(row["with"]), str(row["candidates"]),
            "–" if row["spearman"] is None else f"{row['spearman']:.2f}",
        )
        for row in rows
        if row.keys() >= {"of", "with", "candidates", "spearman"}
        and isinstance(row["spearman"], float | int | None)
    ]  # fmt: skip


def _maps(workspace: Path) -> list[tuple[str, str]]:
    pictures = pictures_in(Workspace(workspace).scores)
    return [(picture.stem, inline(picture.read_bytes())) for picture in pictures]


def _lineage(workspace: Path) -> list[dict[str, Any]]:
    lines = []
    for folder in artifacts_in(workspace):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.kind not in ("report", "export"):
            config = json.dumps(manifest.config, indent=1, ensure_ascii=False)
            inputs = ", ".join(item.path for item in manifest.inputs)
            lines.append({
                "artifact": folder.name, "inputs": inputs, "fingerprint": manifest.fingerprint[:12],
                "finished": manifest.finished[:19].replace("T", " "), "config": config,
            })  # fmt: skip
    return lines
