"""Text that is on every machine with this package, as two JSON-lines files: Python, and C++ for a shifted corpus."""

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

_MOST = 12_000_000
"""Bytes of text in a file."""
_LEFT_OUT = {
    "test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__", "turtledemo",
}  # fmt: skip


def corpora(folder: Path) -> dict[str, Path]:
    """Writes what is missing of ``code.jsonl`` (the standard library) and ``headers.jsonl`` (torch's headers).

    Returns:
        ``code`` and ``headers`` to their files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: folder / f"{name}.jsonl" for name in ("code", "headers")}
    library = Path(sysconfig.get_paths()["stdlib"])
    code = (path for path in library.rglob("*.py") if not _LEFT_OUT & {*path.parts})
    headers = (Path(torch.__file__).parent / "include").rglob("*.h")
    for name, paths in (("code", code), ("headers", headers)):
        if not found[name].is_file():
            _write(found[name], paths)
    return found


def _write(target: Path, paths: Iterable[Path]) -> None:
    """Writes texts in the order of a hash of their names, so that a cut at the end takes from all folders."""
    import hashlib

    size, temporary = 0, target.with_suffix(".partial")
    order = sorted(
        paths, key=lambda path: hashlib.sha256("/".join(path.parts[-3:]).encode()).digest()
    )
    with temporary.open("w", encoding="utf-8") as file:
        for path in order:
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) < 200 or size + len(text) > _MOST:
                continue
            size += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    temporary.replace(target)
