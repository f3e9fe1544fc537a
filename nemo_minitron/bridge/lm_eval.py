"""lm-eval on a loaded model: its tasks, own task YAMLs, and two tasks made from held-out text."""

import contextlib
import difflib
import functools
import glob
import itertools
import json
import logging
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from nemo_minitron.artifacts.manifest import digest, hash_file

MADE_HERE = ("held_out_choice", "held_out_bytes")
ADDED = Path(__file__).parent / "lm_tasks"
"""Tasks that lm-eval lacks."""
_CHOICES = 4
_CONTEXT, _CONTINUATION, _DOCUMENT = 240, 80, 2000
_QUESTIONS = 200


def write_held_out_tasks(documents: Iterable[str], folder: Path, seed: int = 0) -> None:
    """Writes the data of the tasks made from held-out text, as JSONL.

    ``held_out_choice``: the start of a document, and which of four passages of equal length goes on; the
    other three come from other documents. ``held_out_bytes``: documents, to be scored in bits per byte.

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


@dataclass(frozen=True)
class TaskResult:
    """One task on one model.

    Attributes:
        metrics: name to value; standard errors as ``METRIC_stderr``; a filter's name stands in brackets
            behind that of the metric, as in ``exact_match (strict-match)``.
        documents: the metrics that have a number for each document (the mean of which they are), in the
            documents' order.
        better: whether a higher value of a metric is better.
        data_set: hub id of its data, where it comes from there.
    """

    metrics: dict[str, float]
    documents: dict[str, list[float]]
    better: dict[str, bool]
    data_set: str | None = None


def split_shots(name: str) -> tuple[str, int | None]:
    """``arc_challenge@25`` to its task and the number of examples before each question; None: the task's own.

    Raises:
        ValueError: what stands behind the @ is no number.
    """
    task, at, shots = name.partition("@")
    if at and not shots.isdecimal():
        raise ValueError(f"evaluate.tasks: expected TASK@SHOTS, as in arc_challenge@25, found {name!r}")
    return task, int(shots) if at else None


def is_made_here(name: str) -> bool:
    """Whether a task, as ``evaluate.tasks`` names it, is one of those made from held-out text."""
    return split_shots(name)[0] in MADE_HERE


def check_tasks(names: Sequence[str], task_dir: str | None) -> None:
    """Refuses tasks that lm-eval would not know, before anything is measured.

    Raises:
        ValueError: an unknown task, or lm-eval is not installed.
    """
    tasks = [split_shots(name)[0] for name in names]
    unknown = [task for task in tasks if task not in MADE_HERE]
    if not unknown:
        _library()
        return
    manager = _manager(task_dir, True)
    tags = set(manager.all_tags)
    known = [task for task in manager.all_tasks if task not in tags]
    for task in unknown:
        if task in tags:
            members = sorted(name for name, entry in manager.task_index.items() if task in entry.tags)
            raise ValueError(
                f"evaluate.tasks: {task!r} is a tag of several tasks; name them: {', '.join(members)}"
            )
        if task not in known:
            near = difflib.get_close_matches(task, known, 3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(
                f"evaluate.tasks: lm-eval knows no task {task!r} (evaluate.task_dir={task_dir}){hint}"
            )


def task_print(name: str, task_dir: str | None) -> dict[str, str | None]:
    """What decides a task's questions: lm-eval's version, and a YAML that is not its own.

    With the YAML counts what it includes, the Python files beside it where it names a function, the
    data that it names where they lie here, and for a group the same of its tasks.
    """
    task, _ = split_shots(name)
    own: set[Path] = set() if task in MADE_HERE else _files_of(task, _manager(task_dir, True).task_index)
    prints = [[path.name, hash_file(path)] for path in sorted(own)]
    return {"lm_eval": version("lm_eval"), "own": digest(prints) if prints else None}


def _files_of(task: str, index: Any) -> set[Path]:
    entry = index.get(task)
    theirs = Path(_library().__file__).parent
    if entry is None or entry.yaml_path is None or Path(entry.yaml_path).resolve().is_relative_to(theirs):
        return set()
    found, config = _named_in(Path(entry.yaml_path).resolve())
    if "group" in config:
        for member in set(_strings(config.get("task"))) - {task}:
            found |= _files_of(member, index)
    return found


class _Unresolved(yaml.SafeLoader):
    """YAML whose functions stay names."""


_Unresolved.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def _named_in(path: Path) -> tuple[set[Path], dict[str, Any]]:
    """Files that a task's YAML consists of, and what it says without its includes."""
    text = path.read_text(encoding="utf-8")
    config, found = yaml.load(text, _Unresolved) or {}, {path}
    for include in _strings(config.get("include")):
        included = path.parent / include
        if included.is_file() and included != path:
            found |= _named_in(included)[0]
    if "!function" in text or "class" in config:
        found |= set(path.parent.rglob("*.py"))
    for name in _strings([config.get("dataset_path"), config.get("dataset_kwargs")]):
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            there = [Path(name)] if Path(name).exists() else map(Path, glob.glob(name))
            found |= {
                file for at in there for file in ([at] if at.is_file() else at.rglob("*")) if file.is_file()
            }
    return found, config


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _library() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError("evaluate.tasks needs lm-eval: pip install 'nemo-minitron[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@functools.cache
def _manager(task_dir: str | None, defaults: bool) -> Any:
    """lm-eval's index of tasks, which takes seconds to make."""
    _library()
    from lm_eval.tasks import TaskManager

    folders = [str(ADDED), *([] if task_dir is None else [task_dir])]
    return TaskManager(
        include_path=folders if defaults else None, include_defaults=defaults, verbosity="ERROR"
    )


def run_task(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    task_dir: str | None,
    held_out: Path,
    limit: int | None,
    batch_size: int,
) -> TaskResult:
    """Runs a task, or a group of tasks, on one model.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        name: a task, also one of ``MADE_HERE``; with the number of examples behind @.
        task_dir: folder with own task YAMLs, or None.
        held_out: folder that ``write_held_out_tasks`` filled.
        limit: documents per task, or None.
        batch_size: samples per forward pass.

    Raises:
        ValueError: lm-eval is not installed, or does not know the task.
    """
    task, shots = split_shots(name)
    made = task in MADE_HERE
    check_tasks([name], task_dir)
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # for the standard error of some metrics lm-eval resamples in processes that it forks, which hang where
    # this one has threads (Prefect's); and says so on standard output
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    aside = contextlib.redirect_stdout(sys.stderr)
    with _alone(), aside, _unconnected() if made else contextlib.nullcontext():
        # unless told otherwise it resamples 100000 times
        found = _library().simple_evaluate(
            wrapped, tasks=[_made_here(task, held_out) if made else task], num_fewshot=shots, limit=limit,
            task_manager=_manager(task_dir, not made), bootstrap_iters=100,
            confirm_run_unsafe_code=os.environ.get("HF_ALLOW_CODE_EVAL") == "1",
        )  # fmt: skip
    direction = found["higher_is_better"].get(task, {})
    metrics = _numbers(found["results"][task])
    documents = _documents(found["samples"], metrics)
    # None stands where a group's tasks disagree
    better = {metric: direction.get(metric.partition(" (")[0]) is not False for metric in metrics}
    data = found["configs"].get(task, {}).get("dataset_path")
    on_hub = isinstance(data, str) and data.count("/") == 1 and not made and not Path(data).exists()
    return TaskResult(metrics, documents, better, data if on_hub else None)


def _documents(samples: dict[str, list[dict[str, Any]]], metrics: dict[str, float]) -> dict[str, list[float]]:
    """What each metric gave each document; those that are no mean over documents are left out."""
    found: dict[str, list[float]] = {}
    for task in sorted(samples):  # those of a group one after the other
        for row in sorted(samples[task], key=lambda row: row["doc_id"]):
            for metric in row["metrics"]:
                value = row[metric]
                if isinstance(value, int | float):
                    found.setdefault(_titled(metric, row["filter"]), []).append(float(value))
    return {
        metric: values
        for metric, values in found.items()
        # a perplexity's are log-likelihoods, of which more is better
        if metric in metrics and math.isclose(sum(values) / len(values), metrics[metric], rel_tol=1e-6)
    }


def _titled(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Under torchrun each rank runs tasks of its own; lm-eval would give results to local rank 0 only."""
    saved = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if saved is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = saved


@contextlib.contextmanager
def _unconnected() -> Iterator[None]:
    """For tasks made here: the hub is not told that local files were loaded, and nothing shows."""
    from datasets import config

    saved = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        with _silence():
            yield
    finally:
        config.HF_HUB_OFFLINE = saved


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
    numbers = {}
    for key, value in results.items():
        name, comma, filter_name = key.partition(",")
        if comma and isinstance(value, int | float) and not isinstance(value, bool):
            metric = name.removesuffix("_stderr")
            numbers[_titled(metric, filter_name) + name.removeprefix(metric)] = float(value)
    return numbers
