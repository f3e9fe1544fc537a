"""What a stage made, as Prefect artifacts: summary, table, pictures, links, lineage.

Keys are made of the workspace's name and the stage, so that Prefect shows the history of the same
thing over runs. Credentials are masked in all of it; and what comes from outside (names of models,
tasks and files, messages) is text in it, not markup.
"""

import contextlib
import contextvars
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from nemo_minitron.evaluation.gate import GATE_COLUMNS, LINEAGE, GateError
from nemo_minitron.evaluation.report import PAGE, markdown
from nemo_minitron.evaluation.report_types import Lineage
from nemo_minitron.launch.launcher import Call
from nemo_minitron.security import plain_text
from nemo_minitron.security.masking import masked, masked_values
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace import progress
from nemo_minitron.workspace.manifest import read_manifest
from nemo_minitron.workspace.pictures import inline, pictures_in
from nemo_minitron.workspace.typed_json import read_json

GATE_EVENT = "nemo_minitron.gate.failed"
"""Event for automations: a student was too weak to be exported."""
_LARGEST_PICTURE = 700_000
"""Bytes: Prefect drops events over 1.5 MB, and base64 adds a third."""


_SHOW_SECONDS = 5.0


def log_line(text: str) -> None:
    """Prints a line; errors are ignored, because the worker's screen may be gone."""
    with contextlib.suppress(OSError, ValueError):
        print(line(text), file=sys.stderr, flush=True)


def line(text: object) -> str:
    """A text as one line of a screen or a log."""
    return plain_text.plain(masked(str(text)))


def text(value: object) -> str:
    """A text within Markdown, as descriptions are too."""
    return plain_text.markdown(masked(str(value)))


def code(value: object) -> str:
    """A text as a code span within Markdown."""
    return plain_text.code(masked(str(value)))


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table artifact: what is text in it is shown as such, numbers stay numbers."""
    values = masked_values(dict(row))
    return {
        text(name): plain_text.markdown(value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def key(workspace: Path, *parts: str) -> str:
    """An artifact's key: lower case letters, digits and dashes are all that Prefect takes."""
    name = masked("-".join(["minitron", workspace.resolve().name, *parts]))
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stage(workspace: Path, name: str, result: Result, seconds: float) -> None:
    """Publishes what a stage made."""
    headline = text(result.headline)
    create_markdown_artifact(
        markdown=summary(name, result, seconds), key=key(workspace, name), description=headline
    )
    link = masked(result.folder.resolve().as_uri())
    create_link_artifact(link=link, key=key(workspace, name, "folder"), description=headline)
    if result.columns:
        titles = [title or " " for title in result.columns]
        create_table_artifact(
            table=[cells(dict(zip(titles, row, strict=True))) for row in result.rows],
            key=key(workspace, name, "table"), description=headline,
        )  # fmt: skip
    for picture in pictures_in(result.folder):
        if picture.stat().st_size <= _LARGEST_PICTURE:
            create_image_artifact(
                image_url=inline(picture.read_bytes()), key=key(workspace, name, picture.stem),
                description=text(f"{name}: {picture.stem}"),
            )  # fmt: skip
    page = result.folder / PAGE
    if page.is_file():
        create_link_artifact(
            link=masked(page.resolve().as_uri()),
            key=key(workspace, name, "page"),
            description="report",
        )
    if (result.folder / LINEAGE).is_file():
        create_markdown_artifact(
            markdown=lineage(result.folder), key=key(workspace, "lineage"),
            description="from the export back to source and data",
        )  # fmt: skip


def summary(name: str, result: Result, seconds: float) -> str:
    """What a stage made, as Markdown."""
    lines = [f"# {text(name)}", text(result.headline), ""]
    lines.append(f"- {'made' if result.made else 'was there already'}, {seconds:,.1f} s")
    lines.append(f"- {code(result.folder.resolve())}")
    manifest = read_manifest(result.folder)
    if manifest is not None:
        size = sum(output.size for output in manifest.outputs)
        lines.append(
            f"- fingerprint `{manifest.fingerprint[:12]}`, {len(manifest.outputs)} files, {size:,} bytes"
        )
        lines += [
            f"- from {text(item.path)}: {code(item.fingerprint[:12])}" for item in manifest.inputs
        ]
    lines += [f"- note: {text(note)}" for note in result.notes]
    if result.columns:
        lines += ["", markdown(masked_values(result.columns), masked_values(result.rows))]
    return "\n".join(lines)


def gate(workspace: Path, error: GateError) -> None:
    """Publishes why nothing is exported, and emits the event for automations."""
    table = markdown(GATE_COLUMNS, masked_values(error.rows))
    page = f"**the quality gate failed, nothing is exported**\n\n{table}"
    create_markdown_artifact(
        markdown=page, key=key(workspace, "gate"), description="why nothing was exported"
    )
    place = workspace.resolve()
    emit_event(
        GATE_EVENT,
        {
            "prefect.resource.id": f"nemo_minitron.workspace.{key(workspace)}",
            "prefect.resource.name": line(place.name),
        },
        payload={"workspace": line(place), "reason": line(error)},
    )


def lineage(export: Path) -> str:
    """The way from a final export back to its source and data, as Markdown."""
    found = read_json(export / LINEAGE, Lineage)
    rows = []
    for made in reversed(found.get("stages", [])):
        sources = [f"{item.path} {item.fingerprint[:12]}" for item in made["inputs"]]
        revision = made["config"].get("revision")
        at = [f"revision {revision}"] if revision else []
        rows.append((made["kind"], made["fingerprint"][:12], ", ".join([*sources, *at])))
    return markdown(("made", "fingerprint", "from"), masked_values(tuple(rows)))


@contextlib.contextmanager
def progressing(call: Call) -> Iterator[None]:
    """Shows a stage's progress as a progress artifact, from its first report on."""
    ended = threading.Event()
    place = key(Path(call.config.workspace), call.name, "progress")

    def show() -> None:
        """Updates the artifact until the stage has ended."""
        shown, last = None, -1.0
        while not ended.wait(_SHOW_SECONDS):
            found = progress.read(call.progress)
            if found is None or not found.total:
                continue
            percent = min(100.0, 100.0 * found.done / found.total)
            if percent == last:
                continue
            last, description = (
                percent,
                text(f"{call.name}: {found.what}, {found.done:,} of {found.total:,}"),
            )
            try:
                if shown is None:
                    shown = create_progress_artifact(percent, key=place, description=description)
                else:
                    update_progress_artifact(shown, percent, description=description)
            except Exception as error:  # a server that restarts must not end a training
                log_line(f"{call.name}: progress not shown: {error}")

    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: context.run(show), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(0.2)  # a display is not worth waiting for
