"""lm-eval on a loaded model: its tasks, own task YAMLs, and two tasks made from held-out text."""

import contextlib
import itertools
import json
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

MADE_HERE = ("held_out_choice", "held_out_bytes")
_CHOICES = 4
_CONTEXT, _CONTINUATION, _DOCUMENT = 240, 80, 2000
_QUESTIONS = 200


def write_held_out_tasks(documents: Iterable[str], folder: Path, seed: int = 0) -> None:
    """Writes the data of the tasks made from held-out text, as JSONL.

    ``held_out_choice``: the start of a document, and which of four passages of equal length goes on; the
        other three
    come from other documents. ``held_out_bytes``: documents, to be scored in bits per byte.

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
        context, right = _passage(text, start, _CONTEXT), _passage(text, start + _CONTEXT, _CONTINUATION)
        others = draw.sample([j for j in range(len(usable)) if j != i], _CHOICES - 1)
        wrong = [_somewhere(usable[j], draw) for j in others]
        answer = draw.randrange(_CHOICES)
        choices = [*wrong[:answer], right, *wrong[answer:]]
        rows.append({"context": context, "choices": choices, "answer": answer})
    _write_lines(folder / "held_out_choice.jsonl", rows)
    _write_lines(folder / "held_out_bytes.jsonl", [{"text": text[:_DOCUMENT]} for text in usable])


def _passage(text: str, start: int, length: int) -> str:
    return text[start : start + length]


def _somewhere(text: str, draw: random.Random) -> str:
    return _passage(text, draw.randrange(0, len(text) - _CONTINUATION), _CONTINUATION)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _made_here(name: str, folder: Path) -> dict[str, Any]:
    """The lm-eval description of a task made here."""
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
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


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: list[str],
    task_dir: str | None,
    held_out: Path,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Runs tasks on one model.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        names: tasks, those of ``MADE_HERE`` among them.
        task_dir: folder with own task YAMLs, or None.
        held_out: folder that ``write_held_out_tasks`` filled.
        limit: documents per task, or None.
        batch_size: samples per forward pass.

    Returns:
        Task to metric (without filter suffix) to value; standard errors as ``METRIC_stderr``.

    Raises:
        ValueError: lm-eval is not installed, or does not know a task.
    """
    # own data needs no hub; without these lm-eval asks it for every local file
    made_only = all(name in MADE_HERE for name in names)
    if made_only or task_dir:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("evaluate.tasks needs lm-eval: pip install 'nemo-minitron[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=task_dir, include_defaults=not made_only, verbosity="ERROR")
    unknown = [name for name in names if name not in MADE_HERE and name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"evaluate.tasks: lm-eval knows no task {unknown[0]!r} (evaluate.task_dir={task_dir})"
        )
    tasks = [_made_here(name, held_out) if name in MADE_HERE else name for name in names]
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with _silence() if made_only else contextlib.nullcontext():
        # unless told otherwise lm-eval resamples 100000 times for the standard error of some metrics
        found = simple_evaluate(wrapped, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=100)
    return {name: _numbers(found["results"][name]) for name in names if name in found["results"]}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps progress bars, and git's complaint outside of a repository, off the screen."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": .5, "acc_stderr,none": "N/A"}`` to ``{"acc": .5}``."""
    return {
        key.split(",")[0]: float(value)
        for key, value in results.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
