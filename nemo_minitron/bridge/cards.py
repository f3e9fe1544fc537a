"""huggingface_hub: model cards, and evaluation results as the hub reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

_HEADLINES = ("acc_norm", "exact_match (strict-match)", "exact_match", "acc", "f1")


def licence_of(folder: Path) -> dict[str, str | list[str]]:
    """The licence that a model folder's own card names; empty where there is none.

    ``license``, and ``license_name`` and ``license_link`` of one that the hub does not know. A card that
    cannot be read names none.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    try:
        data = huggingface_hub.ModelCard(text, ignore_metadata_errors=True).data
    except (yaml.YAMLError, ValueError):
        return {}
    found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str) or _named(value)}


def _named(value: Any) -> bool:
    """Whether it is a list of names, as several licences are given."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def model_card(
    text: str,
    base_model: str | None,
    licence: Mapping[str, str | list[str]],
    name: str,
    results: list[tuple[str, str, str, float]],
) -> str:
    """A model card: front matter for the hub, then the text.

    Args:
        text: markdown body.
        base_model: hub id of the source model, where it has one.
        licence: as ``licence_of`` gives it.
        name: title of the model.
        results: (task, data set, metric, value) for the model index.

    Returns:
        The card's contents.
    """
    evaluations = [
        huggingface_hub.EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=metric,
            metric_name=task,
            metric_value=value,
        )
        for task, data, metric, value in results
    ]
    data = huggingface_hub.ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        **licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minitron", "pruning", "distillation"],
        model_name=name,
        eval_results=evaluations or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def write_eval_results(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes ``.eval_results/minitron.yaml``: results on data sets of the hub, for its leaderboards.

    Of each task the one number that leaderboards compare: the first of ``_HEADLINES`` that it has, or of
    those of which more is better. Nothing where only a part of the questions was asked.

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
            entries.append(EvalResultEntry(data_set, task.partition("@")[0], found[metric], notes=notes))
    if not entries:
        return
    (folder / ".eval_results").mkdir()
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    (folder / ".eval_results" / "minitron.yaml").write_text(text, encoding="utf-8")
