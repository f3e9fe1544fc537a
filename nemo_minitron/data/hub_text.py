"""Texts that are data sets on the hub: their names, and the commit that a workspace stays with.

A name stands for a commit, which moves when somebody pushes. The commit decides the text's
fingerprint, so it is asked for once in a workspace and noted there. What shares the text (variants,
rounds, steps of a cascade) shares the note.
"""

import functools
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote

import filelock

from nemo_minitron.workspace.layout import build_lock_of, commit_in
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.typed_json import read_json

HUB = "hf://"
FORM = "hf://owner/name[@REV][/config][:split]"
"""How such a text is named; a slash in REV as %2F."""
_FORM = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/:@\s]+))?(/(?P<config>[\w.-]+))?"
    r"(:(?P<split>.+))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubText:
    """A data set on the hub, as a configuration names it.

    Attributes:
        title: the name without its revision: the commit says which it is.
        repository: hub id.
        revision: branch, tag or commit that was asked for; None: the main branch, as it is at first.
        config: of several configurations of the data set the one to read; None: the only one.
        split: which to read.
    """

    title: str
    repository: str
    revision: str | None
    config: str | None
    split: str


def hub_text(name: str) -> HubText | None:
    """What a name says; None where it is not of this form."""
    found = _FORM.fullmatch(name)
    if found is None:
        return None
    asked = found["revision"]
    title = name.replace(f"@{asked}", "", 1) if asked else name
    revision = unquote(asked) if asked else None
    return HubText(title, found["repository"], revision, found["config"], found["split"] or "train")


@dataclass(frozen=True)
class _Note:
    data_set: str
    asked: str | None
    commit: str


def commit_of(text: HubText, notes: Path | None) -> str:
    """The commit to read of a data set.

    Args:
        text: which.
        notes: folder of the workspace with the commits that it stays with; the first to ask notes
            the answer, whichever process, rank or variant that is. None: this process alone stays
            with it.

    Raises:
        ValueError: there is no such data set or revision, or the note is damaged.
        ConnectionError: it is not noted, and the hub could not be reached; worth another try.
    """
    if text.revision is not None and _COMMIT.fullmatch(text.revision):
        return text.revision
    if notes is None:
        return _asked(text.repository, text.revision)
    path = commit_in(notes, text.repository, text.revision)
    if not path.is_file():
        commit = _ask(text.repository, text.revision)
        notes.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(build_lock_of(path)):
            if not path.is_file():  # else another process was first
                write_json(path, asdict(_Note(text.repository, text.revision, commit)))
    noted: _Note = read_json(path, _Note)
    return noted.commit


def _ask(repository: str, revision: str | None) -> str:
    from nemo_minitron.data.hub_data_set import data_set_commit

    return data_set_commit(repository, revision)


_asked = functools.cache(_ask)
