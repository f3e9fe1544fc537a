"""What a stage reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a stage reports.

    Attributes:
        stage: its name.
        folder: its artifact.
        made: False where the artifact was there already.
        headline: one line for the screen.
        columns: column titles of the stage's table, empty where it has none.
        rows: the table's rows.
        facts: the numbers behind it, for ``--json``.
        notes: advice, one line each.
    """

    stage: str
    folder: Path
    made: bool
    headline: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
