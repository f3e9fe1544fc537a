"""report.json, and the tables made from it for the screen, the report, the card and Prefect."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.evaluation.report_types import Report
from nemo_minitron.security import plain_text
from nemo_minitron.workspace.artifacts import check_file
from nemo_minitron.workspace.typed_json import read_json, remedy

FILE = "report.json"
PAGE = "report.html"
NAMES = {
    "teacher": "teacher",
    "pruned": "pruned",
    "student": "distilled",
    "scratch": "from scratch",
}
"""Model of a workspace to what people call it."""


def is_beside(name: str) -> bool:
    """Whether a model is none of the workspace's, but one measured beside them (``evaluate.beside``)."""
    return (
        name not in NAMES and re.fullmatch(r"[A-Za-z0-9][\w.-]{0,39}", name, re.ASCII) is not None
    )


def title(name: str) -> str:
    """What people call a model of a report."""
    return NAMES[name] if name in NAMES else name


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a workspace.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: no report yet; run 'minitron evaluate' first")
    check_file(path)
    report: dict[str, Any] = read_json(path, Report)
    missing = [name for name in ("teacher", "student") if name not in report["models"]]
    named = {*report["models"], *(row["model"] for row in report["compared"])}
    timed = [row["speed"] for row in report["models"].values() if "speed" in row]
    served = [(each, each["vllm"]["cases"]) for each in timed if "cases" in each.get("vllm", {})]
    beside = {name for name in report["models"] if is_beside(name)}
    if (
        missing
        or not named <= {*NAMES, *beside}
        or any(len(each["cases"]) != len(cases) for each, cases in served)
    ):
        raise ValueError(
            f"{path}: damaged: expected teacher, student and no other models than {', '.join(NAMES)}, and as "
            f"many cases of each speed; {remedy(path)}"
        )
    return report


def columns(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Titles of the table's columns: the measure, and every model."""
    return ("measure", *(title(name) for name in report["models"]))


def table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """A row for each measure, as text."""
    models = report["models"].values()
    rows = [
        ("parameters", *(f"{row['parameters']:,}" for row in models)),
        ("held-out loss", *(f"{row['loss']:.4f}" for row in models)),
        ("perplexity", *(f"{row['perplexity']:.3f}" for row in models)),
        ("perplexity retention", *(f"{row['retention']:.1%}" for row in models)),
        ("KL to teacher", *(_or_dash(row["divergence"], "{:.4f}") for row in models)),
        ("top-1 agreement", *(_or_dash(row["top1"], "{:.1%}") for row in models)),
    ]
    if "vocabulary" in report:
        per_byte = [
            ("bits per byte", *(f"{row['bits_per_byte']:.4f}" for row in models)),
            ("tokens per byte", *(f"{row['tokens_per_byte']:.4f}" for row in models)),
        ]
        rows[1:1] = per_byte
    for task, metric in _measured(report):
        cells = (_with_error(row.get("tasks", {}).get(task, {}), metric) for row in models)
        rows.append((f"{task} {metric}", *cells))
    if all("speed" in row for row in models):
        first = [row["speed"]["cases"][0] for row in models]
        rows += [
            ("prefill tok/s", *(f"{case['prefill_tokens_per_second']:,.0f}" for case in first)),
            ("decode tok/s", *(f"{case['decode_tokens_per_second']:,.0f}" for case in first)),
            ("peak MB", *(_or_dash(row["speed"]["peak_megabytes"], "{:,.0f}") for row in models)),
        ]
    return tuple(rows)


MANY = 0.02
"""Share of a text's tokens that are gone, from which on the text says so."""


def vocabulary_notes(report: Mapping[str, Any]) -> tuple[str, ...]:
    """How models of different vocabularies are compared, and whether the text fits the smaller one."""
    if "vocabulary" not in report:
        return ()
    kept = report["vocabulary"]
    gone = 1 - kept["held_out"]
    notes = [
        f"the vocabulary was cut from {kept['of']:,} to {kept['kept']:,} entries: every model reads the "
        "held-out text in its own tokens and is measured by the byte; loss and perplexity are those of as "
        "many bytes as a token of the teacher has"
    ]
    if gone >= MANY:
        notes.append(
            f"{gone:.1%} of the held-out text's tokens are entries that are gone, and are written with "
            "several: the text that the vocabulary was cut for is of another kind (data.calibration)"
        )
    return tuple(notes)


def _measured(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(task, metric) of every task result, in order; standard errors left out."""
    found: dict[tuple[str, str], None] = {}
    for row in report["models"].values():
        for task, metrics in row.get("tasks", {}).items():
            for metric in metrics:
                if not metric.endswith("_stderr") and metric != "sample_len":
                    found[task, metric] = None
    return list(found)


def asked(report: Mapping[str, Any]) -> str:
    """How tasks were asked, in words; empty where as they say."""
    given = report["measured_on"].get("asked") or {}
    words = ["in the chat template, examples as turns"] if given.get("chat") else []
    words += [f"through {given['backend']}"] if "backend" in given else []
    if "repeats" in given:
        words.append(
            f"{given['repeats']} times where the model writes, at temperature {given['temperature']:g}: "
            "means over the answers, errors over the documents"
        )
    return "; ".join(words)


COMPARED = ("measure", "model", "difference to teacher", "p", "recovered gap", "documents")
WRITTEN = ("model", "prefix match", "repetition", "teacher's loss on it")


def compared(report: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Each model against the teacher on the same documents, as text (``COMPARED``).

    p is how likely such a difference would be between equally good models; "recovered gap" is the
    share of what the cut lost that the model has recovered.
    """
    return tuple(
        (
            f"{row['task']} {row['metric']}{'' if row['higher_is_better'] else ' (less is better)'}",
            title(row["model"]),
            f"{row['difference']:+.4f} ± {_or_dash(row['error'], '{:.4f}')}",
            "< 0.001"
            if row["p"] is not None and row["p"] < 0.001
            else _or_dash(row["p"], "{:.3f}"),
            _or_dash(row["recovered"], "{:.0%}"),
            f"{row['documents']:,}",
        )
        for row in report["compared"]
    )


def written(report: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """How models continue prompts by themselves, as text (``WRITTEN``)."""
    rows = [(name, row["writing"]) for name, row in report["models"].items() if "writing" in row]
    return tuple(
        (
            title(name), f"{row['agreement']:.0%}", f"{row['repetition']:.0%}", f"{row['teacher_loss']:.3f}",
        )
        for name, row in rows
    )  # fmt: skip


SPEEDS = (
    "model",
    "batch",
    "prompt",
    "first token ms",
    "prefill tok/s",
    "decode tok/s",
    "vLLM tok/s",
)


def speeds(report: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Speed by batch and length of prompt, as text (``SPEEDS``)."""
    rows = []
    for name, row in report["models"].items():
        for number, case in enumerate(row.get("speed", {"cases": []})["cases"]):
            served = row["speed"].get("vllm", {}).get("cases")
            rows.append(
                (
                    title(name), str(case["batch"]), f"{case['prompt']:,}", f"{case['first_token_ms']:,.1f}",
                    f"{case['prefill_tokens_per_second']:,.0f}", f"{case['decode_tokens_per_second']:,.0f}",
                    _or_dash(served and served[number]["tokens_per_second"], "{:,.0f}"),
                )
            )  # fmt: skip
    return tuple(rows)


def unserved(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Why vLLM could not be timed, a line for each model that it failed on."""
    served = {name: row.get("speed", {}).get("vllm", {}) for name, row in report["models"].items()}
    return tuple(
        f"vLLM, {title(name)}: {row['failed']}" for name, row in served.items() if "failed" in row
    )


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _with_error(metrics: Mapping[str, float], metric: str) -> str:
    if metric not in metrics:
        return "–"
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.3f}" + (f" ± {error:.3f}" if error else "")


def markdown(titles: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    """A table in Markdown, numbers to the right; its cells are escaped, so that they hold no markup."""
    head, *body = (
        "| " + " | ".join(map(plain_text.markdown, row)) + " |" for row in (titles, *rows)
    )
    return "\n".join([head, "|" + "|".join(["---"] + ["---:"] * (len(titles) - 1)) + "|", *body])
