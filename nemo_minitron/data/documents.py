"""From paths to documents and their side of the split, the same on every machine for a given seed.

A document is text, a conversation, or the token ids of a Megatron data set (``document_types``).
What the formats hold is read by ``compressed_files``, ``row_files``, ``saved_data_set`` and ``megatron``;
``hub_text`` says which commit of a data set on the hub is read.
"""

import fnmatch
import functools
import glob
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.data import megatron
from nemo_minitron.data.compressed_files import COMPRESSED, note, opened, text_chunks
from nemo_minitron.data.document_types import (
    Document,
    LongText,
    blank,
    cut,
    draw_of,
    pieces_of,
    text_document,
)
from nemo_minitron.data.hub_text import FORM, HUB, HubText, commit_of, hub_text
from nemo_minitron.data.row_files import (
    document_of,
    json_rows,
    parquet_rows,
    rows_of,
)
from nemo_minitron.data.saved_data_set import saved_rows, saved_set
from nemo_minitron.security import plain_text
from nemo_minitron.workspace.manifest import digest

_SHOWN = 5
_WHOLE = 64 * 2**20
_SUFFIXES = {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}


@dataclass(frozen=True)
class TextSet:
    """Text that has been found, not read.

    Attributes:
        files: files (or dataset folders), sorted.
        remote: data sets on the hub, as ``hub_text.FORM`` says.
        format: one of text, jsonl, parquet, hf; or auto, by file.
        text_key: column of the text.
        side: ``all``, or ``train`` / ``held_out`` of the split by document.
        holdout: share of documents that the split holds out.
        where: the configuration key it came from, for messages.
        notes: folder with the commits that a workspace stays with; None: there is no workspace.
    """

    files: tuple[Path, ...]
    format: str
    text_key: str
    side: str
    holdout: float
    where: str
    remote: tuple[HubText, ...] = ()
    notes: Path | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over contents, format and split; of files over 64 MiB, size, first and last MiB."""
        contents = [[_format_of(path), _fingerprint(path)] for path in self.files]
        contents += [[text.title, commit_of(text, self.notes)] for text in self.remote]
        return digest(
            [
                contents,
                self.format,
                self.text_key,
                self.side,
                self.holdout if self.side != "all" else None,
            ]
        )

    def described(self) -> str:
        """The text in words: key, number of files, side, and data sets on the hub with their commits."""
        remote = [f"; {text.title} at {commit_of(text, self.notes)}" for text in self.remote]
        return f"{self.where} ({len(self.files)} files, {self.side}{''.join(remote)})"


def find_text(
    paths: list[str],
    exclude: list[str],
    format: str,
    text_key: str,
    where: str,
    side: str = "all",
    holdout: float = 0.0,
    notes: Path | None = None,
) -> TextSet:
    """Resolves files, folders and glob patterns.

    Args:
        paths: those, and names of data sets on the hub.
        exclude: patterns of files to leave out.
        format: as in ``TextSet``, as are the others.
        text_key: column of the text.
        where: configuration key.
        side: of the split.
        holdout: share that it holds out.
        notes: where the workspace has the commits that it stays with.

    Raises:
        ValueError: a path matches nothing, or everything is excluded.
    """
    found: set[Path] = set()
    remote = sorted(
        (_on_hub(path, where) for path in paths if path.startswith(HUB)),
        key=lambda text: (text.title, text.revision or ""),
    )
    for pattern in [path for path in paths if not path.startswith(HUB)]:
        matches = _expand(pattern, where)
        if not matches:
            raise ValueError(f"{where}.paths: {pattern!r} matches no file")
        found |= matches
    chained = next(
        (path for path in sorted(found) if "::" in str(path) or "://" in str(path)), None
    )
    if (
        chained is not None
    ):  # readers of data sets take such a name for a chain of protocols, and follow it
        raise ValueError(
            f"{where}.paths: {str(chained)!r}: a name with '::' or '://' in it is not read"
        )
    kept = sorted(
        path for path in found if not any(fnmatch.fnmatch(str(path), rule) for rule in exclude)
    )
    if not kept and not remote:
        raise ValueError(f"{where}.paths: all {len(found)} files are excluded by {where}.exclude")
    if exclude and found and len(kept) == len(found):
        note(Path(", ".join(exclude)), f"{where}.exclude", f"matches none of {len(found):,} files")
    return TextSet(tuple(kept), format, text_key, side, holdout, where, tuple(remote), notes)


def _expand(pattern: str, where: str) -> set[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        if _is_dataset(path):
            return {saved_set(path, f"{where}.paths")}
        found = {file for file in path.rglob("*") if file.is_file()}
        found = {
            f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)
        }
    elif path.is_file():
        found = {path}
    else:
        found = {
            Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()
        }
        found |= {file for file in (Path(f"{path}.bin"),) if megatron.is_megatron(file)}
    found = {path.with_suffix(".bin") if megatron.is_megatron(path) else path for path in found}
    return found


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _on_hub(name: str, where: str) -> HubText:
    found = hub_text(name)
    if found is None:
        raise ValueError(f"{where}.paths: expected {FORM}, found {name!r}")
    return found


def _fingerprint(path: Path) -> str:
    if path.suffix == ".bin" and megatron.is_megatron(path):
        return digest([_file_fingerprint(path), _file_fingerprint(path.with_suffix(".idx"))])
    return _file_fingerprint(path)


def _file_fingerprint(path: Path) -> str:
    if path.is_dir():
        return digest([_fingerprint(file) for file in sorted(path.rglob("*")) if file.is_file()])
    found = path.stat()
    return _hashed(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _hashed(path: Path, size: int, changed: int) -> str:
    """A file's hash, computed once per state of the file, because stages ask several times for terabytes."""
    try:
        opened = path.open("rb")
    except PermissionError as error:
        raise ValueError(f"{plain_text.plain(path)} may not be read") from error
    with opened as file:
        if size <= _WHOLE:
            return hashlib.sha256(file.read()).hexdigest()
        head = file.read(2**20)
        file.seek(-(2**20), os.SEEK_END)
        return hashlib.sha256(str(size).encode() + head + file.read()).hexdigest()


def documents(texts: TextSet, seed: int = 0) -> Iterator[Document]:
    """The documents of a text set, files in an order drawn by ``seed``, empty ones left out.

    A document's side of the split is drawn from its content, so that copies of one text fall on the
    same side. Where this puts all on one side (few documents, copies of one), the end of each text
    is held out instead, and of conversations, which are never cut, the one with the smallest number
    and its copies.

    Raises:
        ValueError: a file cannot be read, or all of the text is one conversation, which cannot be
            split.
    """
    if texts.side == "all":
        yield from _documents(texts, seed)
        return
    split = _split(texts, seed)
    held_out = texts.side == "held_out"
    for document in _documents(texts, seed):
        if split.by_document or isinstance(document, list):
            if (draw_of(document) < split.below) == held_out:
                yield document
            continue
        part = cut(document, 1 - texts.holdout, end=held_out)
        if not blank(part):
            yield part


@dataclass(frozen=True)
class _Split:
    """Which documents are held out: those whose number is below a limit; of texts perhaps only their ends."""

    by_document: bool
    below: float


def _split(texts: TextSet, seed: int) -> _Split:
    below = texts.holdout * 2**64
    sides: set[bool] = set()
    talks: list[int] = []  # the two smallest numbers of conversations
    others = False
    for document in _documents(texts, seed):
        draw = draw_of(document)
        sides.add(draw < below)
        if len(sides) == 2:
            return _Split(True, below)
        if isinstance(document, list):
            talks = sorted({*talks, draw})[:2]
        else:
            others = True
    if len(talks) == 1 and not others:
        raise ValueError(
            f"{texts.where}: the text is one conversation (or copies of one), of which nothing can be held "
            "out for validation; add others, or set data.validation.paths"
        )
    return _Split(False, talks[1] if len(talks) == 2 else 0)


def plain(found: Iterable[Document]) -> Iterator[str]:
    """The documents as text, long ones in pieces; of a conversation its messages, one below the other."""
    for document in found:
        if isinstance(document, str | LongText):
            yield from pieces_of(document)
        elif isinstance(document, list):
            yield "\n".join(message.get("content") or "" for message in document)


def no_text(texts: TextSet) -> str:
    """Says that there is no text, and where."""
    names = [*map(str, texts.files), *(text.title for text in texts.remote)]
    shown = ", ".join(plain_text.plain(name) for name in names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{texts.where}.paths: {len(names)} files hold no text: {shown}{more}"


def _documents(texts: TextSet, seed: int) -> Iterator[Document]:
    sources: list[Path | HubText] = [*texts.files, *texts.remote]
    random.Random(seed).shuffle(sources)
    for source in sources:
        if isinstance(source, HubText):
            yield from (found for found in _from_hub(source, texts) if not blank(found))
            continue
        empty = True
        for document in _read(source, texts):
            empty = False
            if not blank(document):
                yield document
        if empty:
            note(source, texts.where, "is empty and is passed over")


def _from_hub(text: HubText, texts: TextSet) -> Iterator[Document]:
    import datasets

    config = [text.config] if text.config else []
    commit = commit_of(text, texts.notes)
    options = {"split": text.split, "streaming": True, "revision": commit}
    try:
        rows = datasets.load_dataset(text.repository, *config, **options)
        for place, row in rows_of(rows, text.title, texts.where):
            yield document_of(row, texts.text_key, place)
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{texts.where}: {text.title} at {commit}: {said}") from error


def _read(path: Path, texts: TextSet) -> Iterator[Document]:
    kind = texts.format if texts.format != "auto" else _format_of(path)
    if kind == "megatron":
        yield from megatron.documents(path, texts.where)
    elif kind == "text":
        if texts.format == "auto" and _holds_rows(path, texts.where):
            kind = f"holds rows of JSON, and is read as text; {texts.where}.format=jsonl reads the rows"
            note(path, texts.where, kind)
        found = text_document(lambda: text_chunks(path, texts.where))
        if found:
            yield found
    elif kind == "hf" and not _is_dataset(path):
        raise ValueError(f"{texts.where}: {path} is no saved dataset (no dataset_info.json)")
    else:
        for place, row in _ROWS[kind](path, texts.where):
            yield document_of(row, texts.text_key, place)


def _holds_rows(path: Path, where: str) -> bool:
    """Whether a file that is read as text begins with a row of JSON, whatever its name."""
    with opened(path, where) as file:
        first = file.readline(_ROW)
    if not first.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


_ROW = 2**16
"""Bytes of a first row at most, to be known for one."""
_ROWS = {"hf": saved_rows, "jsonl": json_rows, "parquet": parquet_rows}


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "hf"
    if path.suffix == ".bin" and megatron.is_megatron(path):
        return "megatron"
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return next((kind for kind, endings in _SUFFIXES.items() if name.endswith(endings)), "text")
