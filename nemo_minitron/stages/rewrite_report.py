"""Rewrites report.html from the files of a workspace."""

from dataclasses import asdict, replace
from pathlib import Path

from nemo_minitron.evaluation.report import PAGE, columns, read_report, table
from nemo_minitron.evaluation.report_page import write_page
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.layout import Workspace, manifest_in
from nemo_minitron.workspace.manifest import Output, hash_file, read_manifest, write_json


def rewrite(workspace: Path) -> Result:
    """Rewrites report.html from the files of a workspace, and lists it in the report's manifest.

    Raises:
        ValueError: the workspace has not been evaluated.
    """
    folder = Workspace(workspace).report
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder}: no report yet; run 'minitron evaluate' first")
    report = read_report(folder)
    write_page(workspace, folder)
    page = Output(PAGE, (folder / PAGE).stat().st_size, hash_file(folder / PAGE))
    outputs = [page if output.file == PAGE else output for output in manifest.outputs]
    write_json(manifest_in(folder), asdict(replace(manifest, outputs=tuple(outputs))))
    return Result(
        "report", folder, True, str(folder / PAGE), columns(report), table(report), report["models"]
    )
