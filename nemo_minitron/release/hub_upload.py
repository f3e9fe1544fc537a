"""huggingface_hub: uploads of exports."""

import re
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from nemo_minitron.checkpoints.set_aside import GENERATION_CONFIG
from nemo_minitron.checkpoints.side_files import PROCESSOR_FILES, TEMPLATES, TOKENIZER_FILES
from nemo_minitron.evaluation.gate import LINEAGE
from nemo_minitron.release.gguf_export import KINDS
from nemo_minitron.security.links import refuse_link
from nemo_minitron.workspace.layout import MANIFEST

_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|\.eval_results/minitron\.yaml"
)
"""Of an earlier model; beside new shards an old ``model.safetensors`` would be what loads."""
_GGUF = re.compile(rf".*-({'|'.join(kind.upper() for kind in KINDS)})\.gguf")
_BESIDE = {*TOKENIZER_FILES, *PROCESSOR_FILES, GENERATION_CONFIG}
"""What an export may have beside its weights; some readers prefer another tokenizer's file to ours."""


def upload(
    folder: Path,
    repository: str,
    private: bool,
    revision: str | None = None,
    tag: str | None = None,
) -> str:
    """Uploads an export folder in one commit, in the place of an earlier one.

    Weights that an interrupted upload has brought there already are not sent again: the hub knows
    them by their hash.

    Args:
        folder: the export.
        repository: hub id; made where there is none.
        private: whether the repository is private; one that is there and public is refused then.
        revision: branch to commit to, made where there is none; None: main.
        tag: tag that the commit gets; one that another commit has stays there.

    Returns:
        The commit's address.

    Raises:
        ValueError: the hub refuses (no such name, no right to write), the repository is public, or
            the tag is another commit's; or a file of the folder is a link that leads out of it.
        ConnectionError: it could not be reached; worth another try.
    """
    api, where = huggingface_hub.HfApi(), f"export.push_to_hub: {repository!r}"
    for path in sorted(folder.rglob("*")):
        refuse_link(path, folder)
    try:
        return _send(api, folder, repository, private, revision, tag)
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{where}: HF_HUB_OFFLINE is set; nothing is uploaded") from error
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{where}: no token; set HF_TOKEN to one that may write there") from error
    except (HfHubHTTPError, HFValidationError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 400
        text = f"{where}: {str(error).splitlines()[0]}"
        if status in (401, 403):
            text += "; set HF_TOKEN to a token that may write there"
        raise (
            ConnectionError(text) if status >= 500 or status == 429 else ValueError(text)
        ) from error
    except RuntimeError as error:  # huggingface_hub's own for a file that did not come through
        raise ConnectionError(f"{where}: {error}; the next try sends what is missing") from error
    except httpx.TransportError as error:
        raise ConnectionError(f"{where}: the hub cannot be reached") from error


def _send(
    api: huggingface_hub.HfApi,
    folder: Path,
    repository: str,
    private: bool,
    revision: str | None,
    tag: str | None,
) -> str:
    """Makes the repository, branch, commit and tag; see ``upload``."""
    api.create_repo(repository, private=private, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise ValueError(
            f"export.push_to_hub: {repository!r} is public; set export.public=true if the export may be"
        )
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    tagged = _tagged(api, repository, tag)
    if tagged is not None and tagged != api.model_info(repository, revision=revision).sha:
        raise ValueError(
            f"export.push_to_hub: export.tag={tag} is there and means {tagged}; choose another"
        )
    old = _outdated(api.list_repo_files(repository, revision=revision))
    info: Any = api.upload_folder(
        repo_id=repository, folder_path=folder, revision=revision, ignore_patterns=[MANIFEST],
        delete_patterns=old or None, commit_message="Export by nemo_minitron",
    )  # fmt: skip
    if tagged not in (None, info.oid):
        raise ValueError(
            f"export.push_to_hub: uploaded as {info.oid}, but export.tag={tag} stays with {tagged}"
        )
    if tag is not None and tagged is None:
        api.create_tag(repository, tag=tag, revision=info.oid)
    return str(info)


def _outdated(names: list[str]) -> list[str]:
    """Those of a repository's files that a new export takes the place of, whether it has them or not.

    Of a repository that no export lies in, only weights: all else is its owner's.
    """
    ours = LINEAGE in names
    return [
        name
        for name in names
        if _WEIGHTS.fullmatch(name)
        or (ours and (name in _BESIDE or _GGUF.fullmatch(name) or _is_template(name)))
    ]


def _is_template(name: str) -> bool:
    return name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")


def _tagged(api: huggingface_hub.HfApi, repository: str, tag: str | None) -> str | None:
    """The commit that a tag means, where it is there."""
    tags = [] if tag is None else api.list_repo_refs(repository).tags
    return next((ref.target_commit for ref in tags if ref.name == tag), None)
