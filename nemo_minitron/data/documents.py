"""datasets and plain files: from paths to documents, the same on every machine for a given seed.

A document is text, a conversation (a list of messages with ``role`` and ``content``), or the token
ids of a Megatron data set.
"""

import fnmatch
import functools
import glob
import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.compression import compr
from fsspec.utils import infer_compression

from nemo_minitron.data import megatron
from nemo_minitron.workspace.manifest import digest

_WHOLE = 64 * 2**20
_SUFFIXES = {"jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
HUB = "hf://"
_ON_HUB = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>.+))?"
)
Document = str | list[dict[str, Any]] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class TextSet:
    """Text that has been found, not read.

    Attributes:
        files: files (or dataset folders), sorted.
        remote: data sets on the hub, as ``hf://owner/name[/config][:split]``.
        format: one of text, jsonl, parquet, hf; or auto, by file.
        text_key: column of the text.
        side: ``all``, or ``train`` / ``held_out`` of the split by document.
        holdout: share of documents that the split holds out.
        where: the configuration key it came from, for messages.
    """

    files: tuple[Path, ...]
    format: str
    text_key: str
    side: str
    holdout: float
    where: str
    remote: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over contents, format and split; of files over 64 MiB, size, first and last MiB."""
        contents = [[_format_of(path), _fingerprint(path)] for path in self.files]
        contents += [[name, _revision(name)] for name in self.remote]
        return digest(
            [
                contents,
                self.format,
                self.text_key,
                self.side,
                self.holdout if self.side != "all" else None,
            ]
        )


def find_text(
    paths: list[str],
    exclude: list[str],
    format: str,
    text_key: str,
    where: str,
    side: str = "all",
    holdout: float = 0.0,
) -> TextSet:
    """Resolves files, folders and glob patterns.

    Raises:
        ValueError: a path matches nothing, or everything is excluded.
    """
    found: set[Path] = set()
    remote = tuple(sorted(path for path in paths if path.startswith(HUB)))
    wrong = [name for name in remote if not _ON_HUB.fullmatch(name)]
    if wrong:
        raise ValueError(
            f"{where}.paths: expected hf://owner/name[/config][:split], found {wrong[0]!r}"
        )
    for pattern in [path for path in paths if not path.startswith(HUB)]:
        matches = _expand(pattern)
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
    return TextSet(tuple(kept), format, text_key, side, holdout, where, remote)


def _expand(pattern: str) -> set[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        if _is_dataset(path):
            return {path}
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


@functools.cache
def _revision(name: str) -> str:
    """The commit of a data set on the hub, so that the fingerprint is of what is read."""
    from nemo_minitron.data.hub_data_set import data_set_commit

    match = _ON_HUB.fullmatch(name)
    assert match is not None, name
    return data_set_commit(match["repository"])


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
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.sha256(file.read()).hexdigest()
        head = file.read(2**20)
        file.seek(-(2**20), os.SEEK_END)
        return hashlib.sha256(str(size).encode() + head + file.read()).hexdigest()


def documents(texts: TextSet, seed: int = 0) -> Iterator[Document]:
    """The documents of a text set, files in an order drawn by ``seed``, empty ones left out.

    A document's side of the split is drawn from its content, so that copies of one text fall on the
    same side. Where the split by document would hold out nothing (few documents), the end of each
    document is held out instead.
    """
    whole = texts.side == "all"
    by_document = whole or any(_held_out(text, texts.holdout) for text in _documents(texts, seed))
    for text in _documents(texts, seed):
        if whole or (by_document and _held_out(text, texts.holdout) == (texts.side == "held_out")):
            yield text
        elif not by_document:
            cut = int(len(text) * (1 - texts.holdout))
            part = text[:cut] if texts.side == "train" else text[cut:]
            if not _blank(part):
                yield part


def plain(found: Iterable[Document]) -> Iterator[str]:
    """The documents as text; a conversation becomes its messages, one below the other."""
    for document in found:
        if isinstance(document, str):
            yield document
        elif isinstance(document, list):
            yield "\n".join(str(message["content"]) for message in document)


def _held_out(text: Document, share: float) -> bool:
    if isinstance(text, np.ndarray):
        content = text.astype("<i8").tobytes()
    else:
        content = (text if isinstance(text, str) else json.dumps(text)).encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < share * 2**64


def _blank(document: Document) -> bool:
    return not document.strip() if isinstance(document, str) else len(document) == 0


def _documents(texts: TextSet, seed: int) -> Iterator[Document]:
    sources: list[Path | str] = [*texts.files, *texts.remote]
    random.Random(seed).shuffle(sources)
    for source in sources:
        for document in (
            _read(source, texts) if isinstance(source, Path) else _from_hub(source, texts)
        ):
            if not _blank(document):
                yield document


def _from_hub(name: str, texts: TextSet) -> Iterator[Document]:
    import datasets

    match = _ON_HUB.fullmatch(name)
    assert match is not None, name
    config = [match["config"]] if match["config"] else []
    options = {"split": match["split"] or "train", "streaming": True, "revision": _revision(name)}
    try:
        rows = datasets.load_dataset(match["repository"], *config, **options)
        yield from _column(rows, name, texts)
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{texts.where}: {name}: {str(error).splitlines()[0]}") from error


def _content(path: Path) -> bytes:
    """A file's bytes, decompressed where its name says how; the name itself is never taken for an address."""
    with path.open("rb") as file:
        compression = infer_compression(str(path))
        content: bytes = file.read() if compression is None else compr[compression](file).read()
    return content


def _read(path: Path, texts: TextSet) -> Iterator[Document]:
    kind = texts.format if texts.format != "auto" else _format_of(path)
    if kind == "megatron":
        yield from megatron.documents(path, texts.where)
        return
    if kind == "text":
        content = _content(path)
        if b"\0" in content:
            raise ValueError(f"{texts.where}: {path} is not text")
        yield content.decode("utf-8", errors="replace")
        return
    import datasets

    datasets.disable_progress_bars()
    if kind == "hf":
        if not _is_dataset(path):
            raise ValueError(f"{texts.where}: {path} is no saved dataset (no dataset_info.json)")
        _check_saved(path, texts.where)
        rows = datasets.load_from_disk(str(path))
        rows = (
            datasets.concatenate_datasets(list(rows.values())) if isinstance(rows, dict) else rows
        )
    else:
        loader = {"jsonl": "json", "parquet": "parquet"}[kind]
        rows = datasets.load_dataset(loader, data_files=[str(path)], split="train", streaming=True)
    try:
        yield from _column(rows, path, texts)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"{texts.where}: {path} cannot be read as {kind}: {error.__cause__ or error}"
        ) from error


def _check_saved(path: Path, where: str) -> None:
    """Refuses a saved data set whose parts lie elsewhere.

    Raises:
        ValueError: they do, or what lists them cannot be read.
    """
    for listed in sorted(path.rglob("state.json")):
        try:
            names = [
                str(part["filename"]) for part in json.loads(listed.read_bytes())["_data_files"]
            ]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{where}: {listed}: not the state of a saved data set: {error!r:.80}"
            ) from error
        outside = next((name for name in names if Path(name).name != name), None)
        if outside is not None:
            raise ValueError(f"{where}: {listed} names {outside!r}, which is no file beside it")


def _column(rows: Iterable[dict[str, Any]], path: Path | str, texts: TextSet) -> Iterator[Document]:
    """Text, or the messages of a conversation, from the column that holds it."""
    for row in rows:
        found = row.get(texts.text_key)
        if found is None and texts.text_key == "text":  # the usual names of conversations
            found = next((row[key] for key in ("messages", "conversations") if row.get(key)), None)
        if (
            isinstance(found, list)
            and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in found)
        ) or isinstance(found, str):
            yield found
        else:
            raise ValueError(
                f"{texts.where}: {path}: expected text, or messages with role and content, under "
                f"{texts.text_key!r}, found {sorted(row)}"
            )


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "hf"
    if path.suffix == ".bin" and megatron.is_megatron(path):
        return "megatron"
    name = path.name
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return next((kind for kind, endings in _SUFFIXES.items() if name.endswith(endings)), "text")
