"""The texts of ``make real``: what any machine with Python has, and prose of one's own where a path names it.

Three kinds, each with a training and a held-out part as JSONL. ``code``: modules of the standard library. ``prose``: its
docstrings and the topics of ``help()``, or files that are named. ``german``: the messages of programs in German, from the
catalogues that are installed; never trained on. A module that is held out of the code is held out of the docstrings too.
"""

import ast
import gzip
import json
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_minitron.workspace.atomic import replacing_folder

KINDS = ("prose", "code", "german")
_HELD_OUT = 20
"""One document in so many is held out."""
_NOT_READ = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__", "turtledemo"}  # fmt: skip
_SHORT = 400
"""Characters below which a text is left out."""
_PARAGRAPHS = 40
"""Paragraphs of a plain file that make one document."""
_CATALOGUES = "/usr/share/locale/de/LC_MESSAGES"
_MESSAGES = 60
"""Messages that make one document."""


class Document(NamedTuple):
    """A text, and what decides on which side it goes: documents of one origin stay together."""

    origin: str
    text: str


def write_texts(
    folder: Path,
    prose: Iterable[str] = (),
    german: str | None = None,
    library: Path | None = None,
) -> Path:
    """Writes KIND-train.jsonl and KIND-validation.jsonl, unless they are there.

    Args:
        folder: where to.
        prose: files of one's own: .jsonl and .jsonl.gz with a ``text`` each line, or plain text; none:
            the standard library's docstrings.
        german: folder of .mo files; None: the system's.
        library: folder of Python's standard library; None: this Python's.

    Raises:
        ValueError: another choice of prose made the folder; a kind has no text.
    """
    made_from = {"prose": [Path(path).name for path in prose], "python": sys.version.split()[0]}
    settings = folder / "made_from.json"
    if settings.exists():
        if (found := json.loads(settings.read_text())) != made_from:
            raise ValueError(
                f"{folder}: made from {found}, asked for {made_from}; remove it or choose another --root"
            )
        return folder
    with replacing_folder(folder, sync=False) as made:
        modules = list(_modules(library or Path(sysconfig.get_path("stdlib"))))
        away = _held_out("code", modules)
        _write(made, "code", modules, away)
        own = [document for path in prose for document in _file(Path(path))]
        if own:
            _write(made, "prose", own, _held_out("prose", own))
        else:
            topics = list(_topics())
            told = [*topics, *_docstrings(modules)]
            _write(made, "prose", told, away | _held_out("prose", topics))
        messages = list(_messages(Path(german or _CATALOGUES)))
        if messages:
            (made / "german-validation.jsonl").write_text(_lines(messages), encoding="utf-8")
        (made / settings.name).write_text(json.dumps(made_from) + "\n")
    return folder


def _modules(root: Path) -> Iterator[Document]:
    """Sources of the standard library."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _NOT_READ & set(name.parts[:-1]) and name.parts[0] != "pydoc_data":
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= _SHORT:
                yield Document(name.as_posix(), text)


def _topics() -> Iterator[Document]:
    """The topics of the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    yield from (Document(name, text) for name, text in topics.items() if len(text) >= _SHORT)


def _docstrings(modules: Iterable[Document]) -> Iterator[Document]:
    """The docstrings of each module as one text."""
    for origin, source in modules:
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        if len(text) >= _SHORT:
            yield Document(origin, text)


def _file(path: Path) -> Iterator[Document]:
    if path.suffix == ".gz":
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    else:
        text = path.read_text(encoding="utf-8")
    if ".jsonl" not in path.suffixes:
        paragraphs = text.split("\n\n")
        for number, start in enumerate(range(0, len(paragraphs), _PARAGRAPHS)):
            chapter = "\n\n".join(paragraphs[start : start + _PARAGRAPHS])
            yield Document(f"{path.name}:{number}", chapter)
        return
    for number, line in enumerate(text.splitlines()):
        if len(found := json.loads(line)["text"]) >= _SHORT:
            yield Document(f"{path.name}:{number}", found)


def _messages(folder: Path) -> Iterator[Document]:
    """Translations of the catalogues of a folder."""
    for path in sorted(folder.glob("*.mo")):
        if path.name.startswith("iso_"):  # lists of names
            continue
        texts = [text for text in _translations(path.read_bytes()) if len(text) > 40]
        for start in range(0, len(texts), _MESSAGES):
            if len(text := "\n".join(texts[start : start + _MESSAGES])) >= _SHORT:
                yield Document(path.name, text)


def _translations(data: bytes) -> Iterator[str]:
    """Messages of a .mo file (GNU gettext manual, "The Format of GNU MO Files"), without the header."""
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        return
    count, originals, translated = struct.unpack(f"{order}3I", data[8:20])
    for number in range(count):
        length, _ = struct.unpack_from(f"{order}2I", data, originals + 8 * number)
        size, start = struct.unpack_from(f"{order}2I", data, translated + 8 * number)
        if length:
            yield from data[start : start + size].decode("utf-8", errors="replace").split("\0")


def _held_out(kind: str, documents: Iterable[Document]) -> set[str]:
    """Every twentieth origin.

    Raises:
        ValueError: there are fewer than that.
    """
    origins = list(dict.fromkeys(document.origin for document in documents))
    if len(origins) < _HELD_OUT:
        raise ValueError(f"{kind}: expected {_HELD_OUT} documents or more, found {len(origins)}")
    return set(origins[7::_HELD_OUT])


def _write(folder: Path, kind: str, documents: Iterable[Document], held_out: set[str]) -> None:
    parts: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents:
        parts["validation" if document.origin in held_out else "train"].append(document)
    for part, chosen in parts.items():
        (folder / f"{kind}-{part}.jsonl").write_text(_lines(chosen), encoding="utf-8")


def _lines(documents: Iterable[Document]) -> str:
    return "".join(json.dumps({"text": d.text}, ensure_ascii=False) + "\n" for d in documents)
