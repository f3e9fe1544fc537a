"""huggingface_hub: models in, models out, and model cards."""

from pathlib import Path

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
