"""datasets and plain files.

From paths to packed samples of token ids, the same on every machine for a given seed.
"""

import fnmatch
import functools
import glob
import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from nemo_minitron.artifacts.manifest import digest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
_WHOLE = 64 * 2**20
_SUFFIXES = {"jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True)
class TextSet:
    """Text that has been found, not read.

    Attributes:
        files: files (or dataset folders), sorted.
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

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over contents, format and split; of files over 64 MiB, size, first and last MiB."""
        contents = [[_format_of(path), _fingerprint(path)] for path in self.files]
        return digest(
            [contents, self.format, self.text_key, self.side, self.holdout if self.side != "all" else None]
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
    for pattern in paths:
        matches = _expand(pattern)
        if not matches:
            raise ValueError(f"{where}.paths: {pattern!r} matches no file")
        found |= matches
    kept = sorted(path for path in found if not any(fnmatch.fnmatch(str(path), rule) for rule in exclude))
    if not kept:
        raise ValueError(f"{where}.paths: all {len(found)} files are excluded by {where}.exclude")
    return TextSet(tuple(kept), format, text_key, side, holdout, where)


def _expand(pattern: str) -> set[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        if _is_dataset(path):
            return {path}
        files = (file for file in path.rglob("*") if file.is_file())
        return {f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)}
    if path.is_file():
        return {path}
    return {Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()}


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _fingerprint(path: Path) -> str:
    if path.is_dir():
        return digest([_fingerprint(file) for file in sorted(path.rglob("*")) if file.is_file()])
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.sha256(file.read()).hexdigest()
        head = file.read(2**20)
        file.seek(-(2**20), os.SEEK_END)
        return hashlib.sha256(str(size).encode() + head + file.read()).hexdigest()


def documents(texts: TextSet, seed: int = 0) -> Iterator[str]:
    """The documents of a text set, files in an order drawn by ``seed``, empty ones left out.

    A document's side of the split is drawn from its content, so that copies of one text fall on the same
    side. Where the split by document would hold out nothing (few documents), the end of each document is
    held out instead.
    """
    whole = texts.side == "all"
    by_document = whole or any(_held_out(text, texts.holdout) for text in _documents(texts, seed))
    for text in _documents(texts, seed):
        if whole or (by_document and _held_out(text, texts.holdout) == (texts.side == "held_out")):
            yield text
        elif not by_document:
            cut = int(len(text) * (1 - texts.holdout))
            part = text[:cut] if texts.side == "train" else text[cut:]
            if part.strip():
                yield part


def _held_out(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") < share * 2**64


def _documents(texts: TextSet, seed: int) -> Iterator[str]:
    files = list(texts.files)
    random.Random(seed).shuffle(files)
    for path in files:
        for text in _read(path, texts):
            if text.strip():
                yield text


def _read(path: Path, texts: TextSet) -> Iterator[str]:
    kind = texts.format if texts.format != "auto" else _format_of(path)
    if kind == "text":
        with fsspec.open(str(path), "rb", compression="infer") as file:
            content: bytes = file.read()
        if b"\0" in content:
            raise ValueError(f"{texts.where}: {path} is not text")
        yield content.decode("utf-8", errors="replace")
        return
    import datasets

    datasets.disable_progress_bars()
    if kind == "hf":
        if not _is_dataset(path):
            raise ValueError(f"{texts.where}: {path} is no saved dataset (no dataset_info.json)")
        rows = datasets.load_from_disk(str(path))
        rows = datasets.concatenate_datasets(list(rows.values())) if isinstance(rows, dict) else rows
    else:
        loader = {"jsonl": "json", "parquet": "parquet"}[kind]
        rows = datasets.load_dataset(loader, data_files=[str(path)], split="train", streaming=True)
    try:
        yield from _column(rows, path, texts)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"{texts.where}: {path} cannot be read as {kind}: {error.__cause__ or error}"
        ) from error


def _column(rows: Iterable[dict[str, Any]], path: Path, texts: TextSet) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get(texts.text_key), str):
            raise ValueError(
                f"{texts.where}: {path}: expected text under {texts.text_key!r}, found {sorted(row)}"
            )
        yield row[texts.text_key]


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "hf"
    name = path.name
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return next((kind for kind, endings in _SUFFIXES.items() if name.endswith(endings)), "text")


def pack(
    texts: TextSet,
    tokenizer: Any,
    length: int,
    samples: int | None,
    seed: int,
    at_most: bool = False,
    where: str | None = None,
) -> Tensor:
    """Packs documents end to end, separated by the tokenizer's own begin and end tokens, into samples.

    A sample is ``length`` tokens and the one that follows, which is the label of the last: consecutive
        samples
    overlap by one token, so that every token but the first is predicted once.

    Args:
        texts: what to read.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per sample.
        samples: how many to make; None: all.
        seed: order of files, and of samples.
        where: configuration section of ``samples``, for messages; None: that of the text.
        at_most: whether fewer than ``samples`` are acceptable.

    Returns:
        Tensor of shape [samples, length + 1], int64.

    Raises:
        ValueError: no text, too little for one sample, or for ``samples``.
    """
    stream = _token_stream(texts, tokenizer, seed, None if samples is None else samples * length + 1)
    total = len(stream)
    count = (total - 1) // length
    if samples is not None and count < samples and not at_most:
        raise ValueError(
            f"{where or texts.where}.samples: expected {samples} samples of {length} tokens, "
            f"the text yields {max(count, 0)}"
        )
    if count < 1:
        raise ValueError(f"{texts.where}: the text has {total} tokens, one sample needs {length + 1}")
    count = count if samples is None else min(count, samples)
    packed = stream[: count * length + 1].unfold(0, length + 1, length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return packed[order].long()


def _token_stream(texts: TextSet, tokenizer: Any, seed: int, wanted: int | None) -> Tensor:
    """Token ids of the documents end to end, int32, until there are as many as wanted."""
    chunks: list[Tensor] = []
    total = 0
    for ids in _tokenised(documents(texts, seed), tokenizer):
        chunks.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
        if wanted is not None and total >= wanted:
            break
    if not chunks:
        raise ValueError(f"{texts.where}.paths: {len(texts.files)} files hold no text")
    return torch.cat(chunks)


def _tokenised(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 64:
            yield from _encode(batch, tokenizer, end)
            batch = []
    if batch:
        yield from _encode(batch, tokenizer, end)


def _encode(batch: list[str], tokenizer: Any, end: list[int]) -> Iterator[list[int]]:
    for ids in tokenizer(batch, verbose=False)["input_ids"]:
        yield ids if end and ids and ids[-1] == end[0] else ids + end
