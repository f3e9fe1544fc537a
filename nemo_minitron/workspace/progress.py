"""How far a stage is: a small file that whoever started it reads.

Where it lies stands in the environment, because stages are also processes of their own; without it
nothing is written.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.workspace.atomic import replacing
from nemo_minitron.workspace.typed_json import read_json

VARIABLE = "MINITRON_PROGRESS"
"""Environment variable with the file's path."""
_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        what: what is being done, in a word.
        done: how much of it.
        total: how much there is.
    """

    what: str
    done: int
    total: int


_last = 0.0


def note(what: str, done: int, total: int) -> None:
    """Writes down how far this process is, once a second at most; never fails for it."""
    global _last
    path = os.environ.get(VARIABLE)
    if not path or (time.monotonic() - _last < _SECONDS and done < total):
        return
    _last = time.monotonic()
    if int(os.environ.get("RANK", "0")):
        return
    text = json.dumps({"what": what, "done": done, "total": total})
    # a full disk is for the stage itself to find, and a machine that stops needs no bar
    with contextlib.suppress(OSError), replacing(Path(path), sync=False) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(path: Path) -> Progress | None:
    """What a stage has written; None: nothing yet."""
    try:
        found: Progress = read_json(path, Progress)
    except (OSError, ValueError):
        return None
    return found
