"""Which of its source's vocabulary entries an export has: ``vocabulary`` in its minitron.json."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from nemo_minitron.evaluation.gate import LINEAGE
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.typed_json import read_json

_RUN = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


class _Chosen(TypedDict):
    entries: int
    ids: NotRequired[str]


class _Lineage(TypedDict, total=False):
    vocabulary: _Chosen


def in_runs(ids: Sequence[int]) -> str:
    """Ascending ids as text: ``0-255,300``."""
    ends = [i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1]
    bounds = zip([0, *ends], [*ends, len(ids)], strict=True)
    return ",".join(
        f"{ids[first]}" if last == first + 1 else f"{ids[first]}-{ids[last - 1]}"
        for first, last in bounds
    )


def exported_ids(folder: Path, entries: int) -> list[int] | None:
    """The source's id of each entry that an export has; None: it is no export, or of a whole vocabulary.

    Args:
        folder: a model's folder.
        entries: of its vocabulary.

    Raises:
        ValueError: what is written there are no ids, or not so many.
    """
    chosen = _chosen(folder)
    if chosen is None or "ids" not in chosen:
        return None
    runs = [_RUN.fullmatch(run) for run in chosen["ids"].split(",")]
    spans = [(int(run[1]), int(run[2] or run[1])) for run in runs if run is not None]
    rising = all(one[1] < other[0] for one, other in itertools.pairwise(spans))
    # counted before they are written out: the file may be anybody's
    counted = sum(last - first + 1 for first, last in spans)
    if None in runs or not rising or any(a > b for a, b in spans) or counted != entries:
        raise ValueError(
            f"{folder / LINEAGE}: damaged: vocabulary.ids: expected {entries:,} ascending ids, as in "
            f"'0-255,300', found {plain(chosen['ids'], 60)!r}; put it back as it was, or export again"
        )
    return [number for first, last in spans for number in range(first, last + 1)]


def is_cut_somehow(folder: Path, entries: int) -> bool:
    """Whether a model is an export with fewer entries than so many that does not say which.

    Those of earlier versions do not.
    """
    chosen = _chosen(folder)
    return chosen is not None and "ids" not in chosen and chosen["entries"] < entries


def _chosen(folder: Path) -> _Chosen | None:
    path = folder / LINEAGE
    found: _Lineage = read_json(path, _Lineage) if path.is_file() else {}
    return found.get("vocabulary")
