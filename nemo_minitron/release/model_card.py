"""The text of the model card; what comes from files stands in it as text, never as markup.

The prose is in model_card.md.j2. Its filters ``markdown`` and ``code``, and its function ``table``,
make text of what comes from files; huggingface_hub's ``ModelCard.from_template`` has no place for
filters of one's own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_minitron.evaluation.report import (
    COMPARED,
    WRITTEN,
    columns,
    compared,
    markdown,
    table,
    vocabulary_notes,
    written,
)
from nemo_minitron.pruning.plan_file import Plan
from nemo_minitron.release.quickstart import MULTIMODAL_QUICKSTART, QUICKSTART
from nemo_minitron.security import plain_text

_TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def card_text(
    name: str,
    source: Mapping[str, Any],
    plan: Plan,
    report: Mapping[str, Any],
    failed: Sequence[tuple[str, str, str, str]] = (),
    licence: Mapping[str, str] | None = None,
    multimodal: str | None = None,
    steps: int = 1,
) -> str:
    """Body of the card: what it is, quickstart, sizes, results, limits.

    Args:
        name: title.
        source: contents of the workspace's ``teacher/source.json``.
        plan: what was cut.
        report: what was measured.
        failed: rows of the quality gate that did not hold.
        licence: what the source's card says of its licence that does not fit into this card's front
            matter.
        multimodal: ``model_type`` of the multimodal model that it is part of, or None.
        steps: cuts that it went through, each of them distilled; ``plan`` is the last of them.
    """
    given, models = Path(source["given"]).expanduser(), report["models"]
    asked = any(row.get("tasks") for row in models.values())
    environment = ImmutableSandboxedEnvironment(
        autoescape=False,  # it is Markdown: the filters escape
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"markdown": plain_text.markdown, "code": plain_text.code}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        source={**source, "given": given.name}
        if given.is_absolute()
        else source,  # no path of this machine
        plan=plan,
        report=report,
        student=models["student"],
        teacher=models["teacher"],
        failed=failed,
        licence=licence,
        limit=report["measured_on"]["task_limit"] if asked else None,
        quickstart=QUICKSTART if multimodal is None else MULTIMODAL_QUICKSTART,
        multimodal=multimodal,
        steps=steps,
        table=markdown,
        sizes=_sizes(plan),
        columns=columns(report),
        measured=table(report),
        notes=vocabulary_notes(report),
        compared_columns=COMPARED,
        compared=compared(report),
        written_columns=WRITTEN,
        written=written(report),
    )


def _sizes(plan: Plan) -> tuple[tuple[str, str, str], ...]:
    axes = {axis: (plan.before[axis], plan.after[axis]) for axis in plan.before}
    rows = [
        *axes.items(),
        ("parameters", (plan.cost_before.parameters, plan.cost_after.parameters)),
    ]
    return tuple((name, f"{before:,}", f"{after:,}") for name, (before, after) in rows)
