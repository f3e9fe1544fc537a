"""lm-eval on a loaded model: its tasks, own task YAMLs, and the tasks made from held-out text."""

import contextlib
import difflib
import functools
import logging
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from nemo_minitron.evaluation.answers import Answers
from nemo_minitron.evaluation.held_out_tasks import MADE_HERE, documents_of, made_here, split_shots
from nemo_minitron.evaluation.significance import error_of_mean
from nemo_minitron.evaluation.task_members import refuse_what_is_not_done

ADDED = Path(__file__).parent / "lm_tasks"
"""Tasks that lm-eval lacks."""


@dataclass(frozen=True)
class TaskResult:
    """One task on one model.

    Attributes:
        metrics: name to value; standard errors as ``METRIC_stderr``; a filter's name stands in
            brackets behind that of the metric, as in ``exact_match (strict-match)``.
        documents: the metrics that have a number for each document (the mean of which they are), in
            the documents' order.
        better: whether a higher value of a metric is better.
        data_set: hub id of its data, where it comes from there.
    """

    metrics: dict[str, float]
    documents: dict[str, list[float]]
    better: dict[str, bool]
    data_set: str | None = None


def check_tasks(names: Sequence[str], task_dir: str | None, where: str = "evaluate.tasks") -> None:
    """Refuses tasks that lm-eval would not know, before anything is measured.

    Args:
        names: the tasks.
        task_dir: folder with own task YAMLs, or None.
        where: the key that names them.

    Raises:
        ValueError: an unknown task, one that lm-eval would run otherwise than it is asked or that has
            no number, or lm-eval is not installed.
    """
    asked = [split_shots(name) for name in names]
    unknown = [(task, shots) for task, shots in asked if task not in MADE_HERE]
    if not unknown:
        library()
        return
    manager = manager_of(task_dir, *(task for task, _ in unknown))
    tags = set(manager.all_tags)
    known = [task for task in manager.all_tasks if task not in tags]
    for task, shots in unknown:
        if task in tags:
            members = sorted(
                name for name, entry in manager.task_index.items() if task in entry.tags
            )
            raise ValueError(
                f"{where}: {task!r} is a tag of several tasks; name them: {', '.join(members)}"
            )
        if task not in known:
            near = difflib.get_close_matches(task, known, 3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(
                f"{where}: lm-eval knows no task {task!r} (evaluate.task_dir={task_dir}){hint}"
            )
        refuse_what_is_not_done(manager, task, shots, where)


def library() -> Any:
    """The module lm-eval; where it is missing, an error with what to install."""
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(
            "evaluate.tasks needs lm-eval: pip install 'nemo-minitron[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import evaluator

    # it asks git, which runs what the configuration of the working folder's repository says
    evaluator.get_git_commit_hash = lambda: None
    # a dozen programs, pip among them, would describe the machine for each task; nobody reads it
    evaluator.add_env_info = lambda _: None
    return lm_eval


def manager_of(task_dir: str | None, *tasks: str) -> Any:
    """lm-eval's index of tasks: of all of them, which takes seconds to make, or of the user's and ours.

    Args:
        task_dir: folder with own task YAMLs, or None.
        tasks: those that it is for. Where each is a task of the user's or ours, they stand alone.
    """
    near = index_of(task_dir, False)
    alone = set(near.all_subtasks).issuperset(tasks)
    return near if alone else index_of(task_dir, True)


@functools.cache
def index_of(task_dir: str | None, defaults: bool) -> Any:
    """See ``manager_of``; ``defaults``: with lm-eval's own tasks."""
    library()
    from lm_eval.tasks import TaskManager

    folders = [str(ADDED), *([] if task_dir is None else [task_dir])]
    return TaskManager(include_path=folders, include_defaults=defaults, verbosity="ERROR")


def run_task(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    task_dir: str | None,
    held_out: Path,
    limit: int | None,
    batch_size: int,
    *,
    answers: Answers | None = None,
    quiet: bool = False,
) -> TaskResult:
    """Runs a task, or a group of tasks, on one model in this process.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        name: a task, also one of ``MADE_HERE``; with the number of examples behind @.
        task_dir: folder with own task YAMLs, or None.
        held_out: folder that ``write_held_out_tasks`` filled.
        limit: documents per task, or None.
        batch_size: samples per forward pass.
        answers: how it is asked; None: as the task says.
        quiet: whether no progress is shown.

    Raises:
        ValueError: lm-eval is not installed, or does not know the task.
    """
    check_tasks([name], task_dir)
    lm = hf_lm(model, tokenizer, batch_size)
    return ask(lm, name, task_dir, held_out, limit, answers or Answers(), quiet)


def hf_lm(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's wrapper of a model in this process."""
    library()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def ask(
    lm: Any,
    name: str,
    task_dir: str | None,
    held_out: Path,
    limit: int | None,
    answers: Answers,
    quiet: bool = False,
) -> TaskResult:
    """Runs a task, or a group of tasks, on a model of lm-eval's, as often as answers are drawn.

    Args:
        lm: an ``lm_eval.api.model.LM``.
        name: see ``run_task``, and so the rest.
        task_dir: folder with own task YAMLs, or None.
        held_out: folder that ``write_held_out_tasks`` filled.
        limit: documents per task, or None.
        answers: how it is asked.
        quiet: whether no progress is shown.
    """
    task, _ = split_shots(name)
    runs: list[TaskResult] = []
    for draw in range(answers.repeats):
        if hasattr(lm, "_seed"):  # of a client: it goes along with each request
            lm._seed = answers.seed + draw
        found = _evaluated(lm, name, task_dir, held_out, limit, answers.arguments(draw), quiet)
        runs.append(_result(found, task))
        kinds = {found["configs"][each]["output_type"] for each in found["samples"]}
        if "generate_until" not in kinds:
            break  # there is nothing to draw
    result = runs[0] if len(runs) == 1 else averaged(runs)
    return by_document(result, documents_of(name, held_out, limit))


def by_document(result: TaskResult, documents: Sequence[int] | None) -> TaskResult:
    """A result whose standard errors take questions of one document for what they are: alike.

    Args:
        result: lm-eval's, who takes questions for independent.
        documents: which document each question is of; None: each is of one of its own.
    """
    if documents is None:
        return result
    errors = {
        f"{metric}_stderr": error_of_mean(values, documents)
        for metric, values in result.documents.items()
    }
    return replace(result, metrics={**result.metrics, **errors})


def _evaluated(
    lm: Any,
    name: str,
    task_dir: str | None,
    held_out: Path,
    limit: int | None,
    asked: Mapping[str, Any],
    quiet: bool,
) -> Any:
    task, shots = split_shots(name)
    made = task in MADE_HERE
    # for the standard error of some metrics lm-eval resamples in processes that it forks, which
    # hang where this one has threads (Prefect's); and says so on standard output
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    aside = contextlib.redirect_stdout(sys.stderr)
    with _alone(), aside, unconnected(made), _silence() if quiet else contextlib.nullcontext():
        # its default is 100000 resamplings
        return library().simple_evaluate(
            lm, tasks=[made_here(task, held_out) if made else task], num_fewshot=shots, limit=limit,
            task_manager=manager_of(None) if made else manager_of(task_dir, task), bootstrap_iters=100,
            confirm_run_unsafe_code=os.environ.get("HF_ALLOW_CODE_EVAL") == "1", **asked,
        )  # fmt: skip


def _result(found: Any, task: str) -> TaskResult:
    made = task in MADE_HERE
    direction = found["higher_is_better"].get(task, {})
    metrics = _numbers(found["results"][task])
    documents = _documents(found["samples"], metrics)
    # None stands where a group's tasks disagree
    better = {metric: direction.get(metric.partition(" (")[0]) is not False for metric in metrics}
    data = found["configs"].get(task, {}).get("dataset_path")
    on_hub = isinstance(data, str) and data.count("/") == 1 and not made and not Path(data).exists()
    return TaskResult(metrics, documents, better, data if on_hub else None)


def averaged(runs: Sequence[TaskResult]) -> TaskResult:
    """Several draws of the same questions as one result.

    A metric is the mean over the draws. Where it has a number for each document, that is the mean
    over the document's draws, and the standard error is that of these means over the documents: it
    holds what the draws and what the choice of documents would change.

    Args:
        runs: one for each draw.
    """
    first = runs[0]
    shared = [name for name in first.documents if all(name in run.documents for run in runs)]
    documents = {
        name: [
            math.fsum(values) / len(runs)
            for values in zip(*(run.documents[name] for run in runs), strict=True)
        ]
        for name in shared
    }
    metrics = {
        name: math.fsum(run.metrics[name] for run in runs) / len(runs)
        for name in first.metrics
        if all(name in run.metrics for run in runs)
    }
    for name, values in documents.items():
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            metrics[f"{name}_stderr"] = error
    return TaskResult(metrics, documents, first.better, first.data_set)


def _documents(
    samples: dict[str, list[dict[str, Any]]], metrics: dict[str, float]
) -> dict[str, list[float]]:
    """Each metric's value per document; metrics that are no mean over documents are left out."""
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
        if metric in metrics
        and math.isclose(sum(values) / len(values), metrics[metric], rel_tol=1e-6)
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
def unconnected(made: bool) -> Iterator[None]:
    """For tasks made here: keeps ``datasets`` from calling the hub, and hides progress bars."""
    if not made:
        yield
        return
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
    """Hides progress bars, and git's complaint outside of a repository."""
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
