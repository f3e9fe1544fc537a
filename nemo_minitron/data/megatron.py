"""Megatron's indexed data sets: token ids in a ``.bin``, where each document lies in an ``.idx`` beside it.

The index: nine bytes of magic, version (u64, 1), code of the ids' dtype (u8), number of sequences
(u64) and of document boundaries (u64); then the sequences' lengths (i32), their byte offsets (i64)
and, as numbers of sequences, the boundaries (i64). Source:
megatron/core/datasets/indexed_dataset.py of Megatron-LM.
"""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.security.plain_text import plain

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<QBQQ")


def is_megatron(path: Path) -> bool:
    """Whether a path is one of the two files of a data set."""
    index = path.with_suffix(".idx")
    if path.suffix not in (".bin", ".idx") or not (
        path.with_suffix(".bin").is_file() and index.is_file()
    ):
        return False
    with index.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def documents(path: Path, where: str) -> Iterator[np.ndarray[Any, Any]]:
    """Token ids of every document in the data set's own dtype; mapped, not read, where they lie in one piece.

    Args:
        path: the ``.bin``.
        where: configuration section, for messages.

    Raises:
        ValueError: there is no index, or index and data do not fit each other.
    """
    if not is_megatron(path):
        raise ValueError(
            f"{where}: {plain(path)} is no Megatron data set (needs .bin and .idx side by side)"
        )
    index = path.with_suffix(".idx")
    try:
        data, lengths, offsets, bounds = _opened(path, index.read_bytes())
    except (ValueError, OverflowError, struct.error) as error:
        raise ValueError(f"{where}: {plain(index)}: not a usable index: {error}") from error
    starts = offsets // data.itemsize
    for first, last in itertools.pairwise(bounds.tolist()):
        parts = [data[starts[i] :][: lengths[i]] for i in range(first, last)]
        if parts:
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def _opened(path: Path, raw: bytes) -> tuple[Any, Any, Any, Any]:
    """Ids (mapped), lengths and byte offsets of the sequences, and the boundaries of the documents.

    Raises:
        ValueError, OverflowError, struct.error: the index is damaged, or does not fit the ids.
    """
    start = len(_MAGIC)
    version, code, sequences, boundaries = _HEADER.unpack_from(raw, start)
    start += _HEADER.size
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"version {version}, dtype code {code}")
    lengths = np.frombuffer(raw, "<i4", sequences, start).astype(np.int64)
    offsets = np.frombuffer(raw, "<i8", sequences, start + 4 * sequences)
    bounds = np.frombuffer(raw, "<i8", boundaries, start + 12 * sequences)
    dtype = np.dtype(_DTYPES[code])
    data = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
    wrong = (
        ("a length is negative", lengths < 0),
        ("an offset is negative", offsets < 0),
        (
            f"an offset is no multiple of the {dtype.itemsize} bytes of an id",
            offsets % dtype.itemsize,
        ),
        ("it points beyond the end of the data", offsets > data.nbytes - lengths * dtype.itemsize),
        ("its documents lie outside of its sequences", (bounds < 0) | (bounds > sequences)),
        ("its documents are not in order", np.diff(bounds) < 0),
    )
    for words, places in wrong:
        if np.any(places):
            raise ValueError(words)
    return data, lengths, offsets, bounds
