"""Whether a stage in another process gives signs of life: files that change, by whatever clock."""

import contextlib
import time
from pathlib import Path


class SignsOfLife:
    """When files were seen to change last.

    A file that is not there, or whose disk does not answer (a network file system may be away for a
    while), has not changed, and what was seen of it before still counts.
    """

    def __init__(self, *paths: Path | None) -> None:
        self._paths = [path for path in paths if path is not None]
        self._seen: dict[Path, tuple[int, int]] = {}
        self._at = 0.0
        self.last()
        self._at = time.monotonic()

    def last(self) -> float:
        """Looks at the files, and says when the last change of one was seen (time.monotonic).

        As long as there was none: when watching began.
        """
        for path in self._paths:
            with contextlib.suppress(OSError):
                stat = path.stat()
                found = (stat.st_mtime_ns, stat.st_size)
                if self._seen.get(path) != found:
                    self._seen[path], self._at = found, time.monotonic()
        return self._at
