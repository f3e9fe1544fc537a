"""results/: what was measured of a model, one file for each measurement, named by what decides it.

A report that fails at one task, or is rebuilt with one task more, repeats none of the others.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.layout import RESULTS
from nemo_minitron.workspace.manifest import digest, write_json
from nemo_minitron.workspace.typed_json import read_json

FOLDER = RESULTS


@dataclass(frozen=True)
class _Entry:
    """A file: SHA-256 of the value, which those of the first versions do not have."""

    key: dict[str, Any]
    value: dict[str, Any]
    sha256: str | None = None


@dataclass(frozen=True)
class Results:
    """The measurements that lie in a folder."""

    folder: Path

    def get(self, key: Mapping[str, Any]) -> Any:
        """What was measured; None where it was not, or, with a note, where its file is damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            found: _Entry = read_json(path, _Entry)
        except ValueError:
            found = _Entry({}, {}, "")
        if found.sha256 not in (None, digest(found.value)):
            print(f"note: {plain(path)}: damaged; measured again", file=sys.stderr)
            return None
        return found.value if found.key == key else None

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Writes a measurement down, whole or not at all.

        Args:
            key: all that decides it, as JSON has it.
            value: a JSON object.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(key), {"key": key, "value": value, "sha256": digest(value)})

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest(key)[:20]}.json"
