"""huggingface_hub: exports out."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

_OURS = ["*.safetensors", "*.safetensors.index.json", ".eval_results/*"]
"""Of an earlier export; beside new shards an old ``model.safetensors`` would be what loads."""


def upload(
    folder: Path, repository: str, private: bool, revision: str | None = None, tag: str | None = None
) -> str:
    """Uploads an export folder in one commit, in the place of an earlier one.

    Weights that an interrupted upload has brought there already are not sent again: the hub knows them by
    their hash.

    Args:
        folder: the export.
        repository: hub id; made where there is none.
        private: whether a repository that is made is private; one that exists stays what it is.
        revision: branch to commit to, made where there is none; None: main.
        tag: tag that the commit gets.

    Returns:
        The commit's address.

    Raises:
        ValueError: the hub refuses (no such name, no right to write).
        ConnectionError: it could not be reached; worth another try.
    """
    api, where = huggingface_hub.HfApi(), f"export.push_to_hub: {repository!r}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        info: Any = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, ignore_patterns=["manifest.json"],
            delete_patterns=_OURS, commit_message="Export by nemo_minitron",
        )  # fmt: skip
        if tag is not None:
            api.create_tag(repository, tag=tag, revision=info.oid, exist_ok=True)
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{where}: no token; set HF_TOKEN to one that may write there") from error
    except (HfHubHTTPError, HFValidationError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 400
        text = f"{where}: {str(error).splitlines()[0]}"
        if status in (401, 403):
            text += "; set HF_TOKEN to a token that may write there"
        raise (ConnectionError(text) if status >= 500 or status == 429 else ValueError(text)) from error
    except RuntimeError as error:  # huggingface_hub's own for a file that did not come through
        raise ConnectionError(f"{where}: {error}; the next try sends what is missing") from error
    except httpx.TransportError as error:
        raise ConnectionError(f"{where}: the hub cannot be reached") from error
    return str(info)
