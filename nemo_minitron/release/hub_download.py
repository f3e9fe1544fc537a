"""huggingface_hub: downloads of models."""

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from nemo_minitron.checkpoints.side_files import LICENCES
from nemo_minitron.workspace.manifest import hash_file

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md", *LICENCES]
_NOT = ["[!a]*/*", "a[!d]*/*", "consolidated*.safetensors"]
"""Other libraries' copies of the weights, and whatever lies in sub-folders but additional_chat_templates."""


def download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Fetches a model's config, safetensors and tokenizer into the hub cache.

    What an interrupted download has brought is not fetched again.

    Returns:
        The snapshot's folder and the commit that ``revision`` stands for.

    Raises:
        ValueError: there is no such repository or revision, it is gated, the disk is too small, or
            it is not in the cache and HF_HUB_OFFLINE is set.
        ConnectionError: the hub could not be reached; worth another try.
    """
    where, offline = f"source.model: {repository!r}", constants.HF_HUB_OFFLINE
    wanted = {"revision": revision, "allow_patterns": _FILES, "ignore_patterns": _NOT}
    try:
        with contextlib.suppress(DryRunError):  # the download itself says better what is wrong
            planned = huggingface_hub.snapshot_download(repository, dry_run=True, **wanted)
            _check_room(where, sum(file.file_size or 0 for file in planned if file.will_download))
        folder = huggingface_hub.snapshot_download(repository, **wanted)
    except GatedRepoError as error:  # first: it is a kind of RepositoryNotFoundError
        raise ValueError(
            f"{where} is gated: accept its conditions on its page, then set HF_TOKEN to a token of yours"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{where} is neither a folder here nor a repository on the hub that this account sees "
            f"({str(error).splitlines()[0]})"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        kind = ValueError if status in (401, 403, 404) else ConnectionError
        raise kind(f"{where}: {str(error).splitlines()[0]}") from error
    except (LocalEntryNotFoundError, httpx.TransportError) as error:
        if offline:
            raise ValueError(
                f"{where} is not in the hub's cache, and HF_HUB_OFFLINE is set"
            ) from error
        raise ConnectionError(
            f"{where} is no folder here, and the hub cannot be reached"
        ) from error
    return Path(folder), Path(folder).name


def _check_room(where: str, size: int) -> None:
    """Refuses a download that the cache's disk cannot hold."""
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(p for p in (cache, *cache.absolute().parents) if p.exists())).free
    if size > free:
        raise ValueError(
            f"{where} takes {size / 1e9:,.1f} GB more, {free / 1e9:,.1f} GB are free in {cache}; "
            "set HF_HOME to a folder on a larger disk"
        )


def check_hashes(snapshot: Path) -> None:
    """Compares the cached files with their names, which are the hub's hashes of them.

    A file that differs is deleted, so that the next try fetches it again.

    Raises:
        ConnectionError: one differs.
    """
    for path in sorted(snapshot.iterdir()):
        # the name behind the first link: that one may be a link itself, into a store that all
        # repositories share, where files have names of another kind (huggingface_hub 2.4, Xet)
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        large, small = (re.fullmatch(f"[0-9a-f]{{{digits}}}", blob.name) for digits in (64, 40))
        if (large and hash_file(blob) != blob.name) or (small and _git_hash(blob) != blob.name):
            for each in (blob.resolve(), blob, path):
                each.unlink(missing_ok=True)
            raise ConnectionError(
                f"{path}: arrived damaged; deleted, the next try fetches it again"
            )


def _git_hash(path: Path) -> str:
    """The git hash of a file, which the hub uses for small files."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def download_config(repository: str) -> Path:
    """Fetches a model's config.json alone; returns the folder it lies in.

    Raises:
        ValueError: there is no such repository.
        ConnectionError: the hub could not be reached.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repository, "config.json")).parent
    except LocalEntryNotFoundError as error:  # first: it is a kind of EntryNotFoundError
        raise ConnectionError(
            f"{repository!r} is no folder here, and the hub cannot be reached"
        ) from error
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise ValueError(
            f"{repository!r} is neither a folder here nor a repository on the hub"
        ) from error
