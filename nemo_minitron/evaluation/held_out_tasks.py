"""Two lm-eval tasks made from held-out text, which need no network."""

import glob
import itertools
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.data.documents import documents, plain
from nemo_minitron.workspace.build import building

MADE_HERE = ("held_out_choice", "held_out_bytes")
_CHOICES = 4
_CONTEXT, _CONTINUATION, _DOCUMENT = 240, 80, 2000
_QUESTIONS = 200


def write_held_out_tasks(documents: Iterable[str], folder: Path, seed: int = 0) -> None:
    """Writes the data of the tasks made from held-out text, as JSONL.

    ``held_out_choice``: a passage of a document, and which of four passages of equal length goes
    on; the other three come from other documents. Where there are fewer documents than questions,
    several are of one (``documents_of``). ``held_out_bytes``: documents, to be scored in
    bits per byte.

    Args:
        documents: held-out documents.
        folder: an existing folder.
        seed: seed of the choice of passages.

    Raises:
        ValueError: fewer than four documents are long enough.
    """
    long_enough = (text for text in documents if len(text) >= 2 * (_CONTEXT + _CONTINUATION))
    usable = list(itertools.islice(long_enough, _QUESTIONS))
    if len(usable) < _CHOICES:
        raise ValueError(
            f"evaluate.tasks: {MADE_HERE[0]} needs at least {_CHOICES} held-out documents of "
            f"{2 * (_CONTEXT + _CONTINUATION)} characters, found {len(usable)}"
        )
    draw = random.Random(seed)
    rows = []
    for question in range(_QUESTIONS):
        i = question % len(usable)
        text = usable[i]
        start = draw.randrange(0, len(text) - _CONTEXT - _CONTINUATION)
        context, right = (
            _passage(text, start, _CONTEXT),
            _passage(text, start + _CONTEXT, _CONTINUATION),
        )
        others = draw.sample([j for j in range(len(usable)) if j != i], _CHOICES - 1)
        wrong = [_somewhere(usable[j], draw) for j in others]
        answer = draw.randrange(_CHOICES)
        choices = [*wrong[:answer], right, *wrong[answer:]]
        rows.append({"context": context, "choices": choices, "answer": answer})
    _write_lines(folder / "held_out_choice.jsonl", rows)
    _write_lines(folder / "held_out_bytes.jsonl", [{"text": text[:_DOCUMENT]} for text in usable])


def held_out_data(texts: Any, folder: Path) -> None:
    """The data of both tasks, made from a held-out text unless it is there.

    Raises:
        ValueError: see ``write_held_out_tasks``.
    """
    if folder.is_dir():
        return
    with building(folder) as temporary:
        write_held_out_tasks(plain(documents(texts)), temporary)


def documents_of(name: str, folder: Path, limit: int | None) -> list[int] | None:
    """Which document each question of a task made here is of; None: each is of one of its own.

    Args:
        name: as ``evaluate.tasks`` names it.
        folder: what ``write_held_out_tasks`` filled.
        limit: questions that are asked at most.
    """
    if split_shots(name)[0] != MADE_HERE[0]:
        return None
    with (folder / "held_out_bytes.jsonl").open("rb") as file:  # a line for each document
        usable = sum(1 for _ in file)
    asked = min(limit or _QUESTIONS, _QUESTIONS)
    return [question % usable for question in range(asked)] if asked > usable else None


def _passage(text: str, start: int, length: int) -> str:
    return text[start : start + length]


def _somewhere(text: str, draw: random.Random) -> str:
    return _passage(text, draw.randrange(0, len(text) - _CONTINUATION), _CONTINUATION)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_here(name: str, folder: Path) -> dict[str, Any]:
    """The lm-eval description of a task made here."""
    # datasets takes a name for a pattern; a workspace may be called runs[1]
    data = {"data_files": {"test": glob.escape(os.path.abspath(folder / f"{name}.jsonl"))}}
    base = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    if name == "held_out_bytes":
        metrics = [{"metric": "bits_per_byte"}]
        return {
            **base, "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": metrics,
        }  # fmt: skip
    return {
        **base,
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


def split_shots(name: str) -> tuple[str, int | None]:
    """``arc_challenge@25`` to its task and the number of examples before each question; None: the task's own.

    Raises:
        ValueError: what stands behind the @ is no number.
    """
    task, at, shots = name.partition("@")
    if at and not shots.isdecimal():
        raise ValueError(
            f"evaluate.tasks: expected TASK@SHOTS, as in arc_challenge@25, found {name!r}"
        )
    return task, int(shots) if at else None


def is_made_here(name: str) -> bool:
    """Whether a task, as ``evaluate.tasks`` names it, is one of those made from held-out text."""
    return split_shots(name)[0] in MADE_HERE
