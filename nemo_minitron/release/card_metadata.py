"""huggingface_hub: model cards, and evaluation results as the hub reads them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from nemo_minitron.families.table import LOADER
from nemo_minitron.security.links import leads_out
from nemo_minitron.security.plain_text import plain

_HEADLINES = ("acc_norm", "exact_match (strict-match)", "exact_match", "acc", "f1")


_IDENTIFIER = re.compile(r"[A-Za-z0-9](?:[\w.+(), -]{0,98}[\w.+)])?", re.ASCII)
"""The hub's id of a licence, a licence's name, or the name of the file that holds it."""
_LINK = re.compile(r"https?://[A-Za-z0-9][\w.~:/?#@!$&*+,;=%-]{1,500}", re.ASCII)
_LONGEST_CARD = 2**20
_HUB_ID = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)
_FORMS = {
    "license": (_IDENTIFIER,), "license_name": (_IDENTIFIER,), "license_link": (_LINK, _IDENTIFIER),
}  # fmt: skip
"""Fields of a card's front matter about the licence, and the forms in which they are taken over."""


def licence_of(folder: Path) -> tuple[dict[str, str | list[str]], dict[str, str]]:
    """The licence that a model folder's own card names; empty where there is none.

    ``license``, and ``license_name`` and ``license_link`` of one that the hub does not know. A card
    that cannot be read names none.

    Returns:
        What another card's front matter can take over: ids on one line, and links. And the rest as
        text, to be quoted: it comes from a stranger.
    """
    card = folder / "README.md"
    if not card.is_file() or leads_out(card, folder):
        return {}, {}
    with card.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(_LONGEST_CARD)
    front = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        events = yaml.parse(front[1], LOADER) if front else ()
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            return {}, {}  # a few lines of them can stand for gigabytes
        data = huggingface_hub.ModelCard(text, ignore_metadata_errors=True).data
    except Exception:  # whatever YAML's constructors raise at a stranger's text
        return {}, {}
    taken: dict[str, str | list[str]] = {}
    rest: dict[str, str] = {}
    for name, forms in _FORMS.items():
        value = data.get(name)
        each = value if isinstance(value, list) and name == "license" else [value]
        if each and all(
            isinstance(one, str) and any(form.fullmatch(one) for form in forms) for one in each
        ):
            taken[name] = value
        elif value:
            rest[name] = plain(value, 500)
    return taken, rest


def model_card(
    text: str,
    base_model: str | None,
    licence: Mapping[str, str | list[str]],
    name: str,
    results: list[tuple[str, str, str, float]],
    multimodal: bool = False,
) -> str:
    """A model card: front matter for the hub, then the text.

    Args:
        text: markdown body.
        base_model: hub id of the source model, where it has one; left out where it is no hub id.
        licence: what ``licence_of`` takes over.
        name: title of the model.
        results: (task, data set, metric, value) for the model index.
        multimodal: whether it reads images, too.

    Returns:
        The card's contents.
    """
    evaluations = [
        huggingface_hub.EvalResult(
            task_type="text-generation",
            dataset_type=plain(data),
            dataset_name=plain(data),
            metric_type=plain(metric),
            metric_name=plain(task),
            metric_value=value,
        )
        for task, data, metric, value in results
    ]
    named = base_model is not None and _HUB_ID.fullmatch(base_model) is not None
    data = huggingface_hub.ModelCardData(
        base_model=base_model if named else None,
        base_model_relation="finetune" if named else None,
        **licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        tags=["minitron", "pruning", "distillation"],
        model_name=plain(name),
        eval_results=evaluations or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def write_eval_results(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes ``.eval_results/minitron.yaml``: results on data sets of the hub, for its leaderboards.

    Of each task the one number that leaderboards compare: the first of ``_HEADLINES`` that it has,
    or of those of which more is better. Nothing where only a part of the questions was asked.

    Args:
        folder: the export.
        report: contents of report.json.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if report["measured_on"]["task_limit"] is not None:
        return
    entries = []
    for task, data_set in report["data_sets"].items():
        found, better = report["models"]["student"]["tasks"][task], report["better"][task]
        metric = next((m for m in (*_HEADLINES, *found) if m in found and better.get(m)), None)
        if metric is not None:
            notes = f"{metric}, lm-eval task {task}"
            entries.append(
                EvalResultEntry(data_set, task.partition("@")[0], found[metric], notes=notes)
            )
    if not entries:
        return
    (folder / ".eval_results").mkdir()
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    (folder / ".eval_results" / "minitron.yaml").write_text(text, encoding="utf-8")
