"""huggingface_hub: models in, models out, and model cards."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "*.md"]


def download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Fetches a model's config, safetensors and tokenizer into the hub cache.

    Returns:
        The snapshot's folder and the commit that ``revision`` stands for.

    Raises:
        ValueError: there is no such repository or revision.
        ConnectionError: the hub could not be reached; worth another try.
    """
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_FILES)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"source.model: {repository!r} is neither a folder here nor a repository on the hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise ValueError(f"source.model: {repository!r}: {str(error).splitlines()[0]}") from error
        raise ConnectionError(f"source.model: {repository!r}: {str(error).splitlines()[0]}") from error
    except (LocalEntryNotFoundError, httpx.TransportError) as error:
        raise ConnectionError(
            f"source.model: {repository!r} is no folder here, and the hub cannot be reached"
        ) from error
    return Path(folder), Path(folder).name


def upload(folder: Path, repository: str, private: bool) -> str:
    """Uploads an export folder; what was uploaded before is not sent again.

    Returns:
        The commit's address.

    Raises:
        ValueError: the hub refuses (no such name, no right to write).
        ConnectionError: it could not be reached; worth another try.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        info: Any = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export by nemo_minitron"
        )
    except (HfHubHTTPError, HFValidationError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 400
        text = f"export.push_to_hub: {repository!r}: {str(error).splitlines()[0]}"
        raise (ConnectionError(text) if status >= 500 else ValueError(text)) from error
    except httpx.TransportError as error:
        raise ConnectionError(f"export.push_to_hub: {repository!r}: the hub cannot be reached") from error
    return str(info)


def licence_of(folder: Path) -> str | None:
    """The licence that a model folder's own card names, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    licence = huggingface_hub.ModelCard(
        card.read_text(encoding="utf-8"), ignore_metadata_errors=True
    ).data.license
    return licence if isinstance(licence, str) else None


def model_card(
    text: str,
    base_model: str | None,
    licence: str | None,
    name: str,
    results: list[tuple[str, str, str, float]],
) -> str:
    """A model card: front matter for the hub, then the text.

    Args:
        text: markdown body.
        base_model: hub id of the source model, where it has one.
        licence: licence id, where it is known.
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
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minitron", "pruning", "distillation"],
        model_name=name,
        eval_results=evaluations or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def download_config(repository: str) -> Path:
    """Fetches a model's config.json alone; returns the folder it lies in.

    Raises:
        ValueError: there is no such repository.
        ConnectionError: the hub could not be reached.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repository, "config.json")).parent
    except LocalEntryNotFoundError as error:  # first: it is a kind of EntryNotFoundError
        raise ConnectionError(f"{repository!r} is no folder here, and the hub cannot be reached") from error
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise ValueError(f"{repository!r} is neither a folder here nor a repository on the hub") from error


def data_set_commit(repository: str) -> str:
    """The commit that a data set's main branch stands for.

    Raises:
        ValueError: there is no such data set.
        ConnectionError: the hub could not be reached, or is in trouble; worth another try.
    """
    try:
        return str(huggingface_hub.HfApi().dataset_info(repository).sha)
    except (RepositoryNotFoundError, HFValidationError) as error:
        text = f"{repository!r}: no such data set on the hub ({str(error).splitlines()[0]})"
        raise ValueError(text) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise ConnectionError(f"{repository!r}: the hub cannot be reached") from error
