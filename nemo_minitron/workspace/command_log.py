"""Commands that worked on a workspace, secrets masked."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from nemo_minitron.security.masking import masked
from nemo_minitron.workspace.layout import COMMANDS, Workspace
from nemo_minitron.workspace.manifest import now
from nemo_minitron.workspace.typed_json import read_lines

__all__ = ["COMMANDS", "commands_in", "note_command"]


class _Line(TypedDict):
    command: str


def note_command(workspace: Path, words: Sequence[str]) -> None:
    """Writes down the command that a run was started with, for its report; credentials are masked."""
    text = masked(shlex.join(words))
    if commands_in(workspace)[-1:] != [text]:
        with Workspace(workspace).commands.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": now(), "command": text}) + "\n")


def commands_in(workspace: Path) -> list[str]:
    """Commands that worked on a workspace, in order."""
    return [line["command"] for line in read_lines(Workspace(workspace).commands, _Line)]
