"""huggingface_hub: model cards, and evaluation results as the hub reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml


def licence_of(folder: Path) -> dict[str, str]:
    """The licence that a model folder's own card names; empty where there is none.

    ``license``, and ``license_name`` and ``license_link`` of one that the hub does not know.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    data = huggingface_hub.ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def model_card(
    text: str,
    base_model: str | None,
    licence: Mapping[str, str],
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

    Args:
        folder: the export.
        report: contents of report.json.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # not in old ones

    entries = []
    for task, data_set in report["data_sets"].items():
        for metric, value in report["models"]["student"]["tasks"][task].items():
            if not metric.endswith("_stderr"):
                notes = f"{metric}, lm-eval task {task}"
                entries.append(EvalResultEntry(data_set, task.partition("@")[0], value, notes=notes))
    (folder / ".eval_results").mkdir()
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    (folder / ".eval_results" / "minitron.yaml").write_text(text, encoding="utf-8")
