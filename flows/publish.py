"""What a stage made, as Prefect artifacts: summary, table, pictures, links, lineage.

Keys are made of the workspace's name and the stage, so that Prefect shows the history of the same thing over
runs.
"""

import base64
import contextlib
import contextvars
import json
import re
import sys
import threading
from collections.abc import Iterator
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

from nemo_minitron.artifacts import progress
from nemo_minitron.artifacts.gate import GATE_COLUMNS, LINEAGE, GateError
from nemo_minitron.artifacts.manifest import read_manifest
from nemo_minitron.artifacts.report import PAGE, markdown
from nemo_minitron.launch.stage import Call
from nemo_minitron.stages.stage import Result

GATE_EVENT = "nemo_minitron.gate.failed"
"""Event for automations: a student was too weak to be exported."""
_LARGEST_PICTURE = 700_000
"""Bytes: Prefect drops events over 1.5 MB, and base64 adds a third."""


_SHOW_SECONDS = 5.0


def say(text: str) -> None:
    """A line on the screen, which may have gone with the worker that held it: nothing depends on it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def key(workspace: Path, *parts: str) -> str:
    """An artifact's key: lower case letters, digits and dashes are all that Prefect takes."""
    name = "-".join(["minitron", workspace.resolve().name, *parts])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stage(workspace: Path, name: str, result: Result, seconds: float) -> None:
    """Publishes what a stage made."""
    create_markdown_artifact(
        markdown=_summary(name, result, seconds), key=key(workspace, name), description=result.headline
    )
    link = result.folder.resolve().as_uri()
    create_link_artifact(link=link, key=key(workspace, name, "folder"), description=result.headline)
    if result.columns:
        titles = [title or " " for title in result.columns]
        create_table_artifact(
            table=[dict(zip(titles, row, strict=True)) for row in result.rows],
            key=key(workspace, name, "table"),
            description=result.headline,
        )
    for picture in sorted((result.folder / "plots").glob("*.png")):
        if picture.stat().st_size <= _LARGEST_PICTURE:
            create_image_artifact(
                image_url=inline(picture.read_bytes()), key=key(workspace, name, picture.stem),
                description=f"{name}: {picture.stem}",
            )  # fmt: skip
    page = result.folder / PAGE
    if page.is_file():
        create_link_artifact(
            link=page.resolve().as_uri(), key=key(workspace, name, "page"), description="report"
        )
    if (result.folder / LINEAGE).is_file():
        create_markdown_artifact(
            markdown=lineage(result.folder), key=key(workspace, "lineage"),
            description="from the export back to source and data",
        )  # fmt: skip


def inline(picture: bytes) -> str:
    """A PNG as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _summary(name: str, result: Result, seconds: float) -> str:
    lines = [f"# {name}", result.headline, ""]
    lines.append(f"- {'made' if result.made else 'was there already'}, {seconds:,.1f} s")
    lines.append(f"- `{result.folder.resolve()}`")
    manifest = read_manifest(result.folder)
    if manifest is not None:
        size = sum(output.size for output in manifest.outputs)
        lines.append(
            f"- fingerprint `{manifest.fingerprint[:12]}`, {len(manifest.outputs)} files, {size:,} bytes"
        )
        lines += [f"- from {item.path}: `{item.fingerprint[:12]}`" for item in manifest.inputs]
    lines += [f"- note: {note}" for note in result.notes]
    if result.columns:
        lines += ["", markdown(result.columns, result.rows)]
    return "\n".join(lines)


def gate(workspace: Path, error: GateError) -> None:
    """Publishes why nothing is exported, and tells automations."""
    text = f"**the quality gate failed, nothing is exported**\n\n{markdown(GATE_COLUMNS, error.rows)}"
    create_markdown_artifact(
        markdown=text, key=key(workspace, "gate"), description="why nothing was exported"
    )
    place = workspace.resolve()
    emit_event(
        GATE_EVENT,
        {
            "prefect.resource.id": f"nemo_minitron.workspace.{key(workspace)}",
            "prefect.resource.name": place.name,
        },
        payload={"workspace": str(place), "reason": str(error)},
    )


def lineage(export: Path) -> str:
    """The way from a final export back to its source and data, as Markdown."""
    found: dict[str, Any] = json.loads((export / LINEAGE).read_text(encoding="utf-8"))
    rows = []
    for made in reversed(found["stages"]):
        sources = [f"{item['path']} `{item['fingerprint'][:12]}`" for item in made["inputs"]]
        revision = made["config"].get("revision")
        at = [f"revision {revision}"] if revision else []
        rows.append((made["kind"], f"`{made['fingerprint'][:12]}`", ", ".join([*sources, *at])))
    return markdown(("made", "fingerprint", "from"), tuple(rows))


@contextlib.contextmanager
def progressing(call: Call) -> Iterator[None]:
    """Shows how far a stage is, as an artifact that moves, from the moment it says so."""
    ended = threading.Event()
    place = key(Path(call.config.workspace), call.name, "progress")

    def show() -> None:
        """Moves the artifact until the stage has ended."""
        shown, last = None, -1.0
        while not ended.wait(_SHOW_SECONDS):
            found = progress.read(call.progress)
            if found is None or not found.total:
                continue
            percent = min(100.0, 100.0 * found.done / found.total)
            if percent == last:
                continue
            last, text = percent, f"{call.name}: {found.what}, {found.done:,} of {found.total:,}"
            try:
                if shown is None:
                    shown = create_progress_artifact(percent, key=place, description=text)
                else:
                    update_progress_artifact(shown, percent, description=text)
            except Exception as error:  # a server that restarts must not end a training
                say(f"{call.name}: progress not shown: {error}")

    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: context.run(show), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(0.2)  # a display is not worth waiting for
