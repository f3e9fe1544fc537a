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
    """Token ids of every document, int64; read through a memory map.

    Args:
        path: the ``.bin``.
        where: configuration section, for messages.

    Raises:
        ValueError: there is no index, or index and data do not fit each other.
    """
    if not is_megatron(path):
        raise ValueError(
            f"{where}: {path} is no Megatron data set (needs .bin and .idx side by side)"
        )
    raw = path.with_suffix(".idx").read_bytes()
    start = len(_MAGIC)
    try:
        version, code, sequences, boundaries = _HEADER.unpack_from(raw, start)
        start += _HEADER.size
        if version != 1 or code not in _DTYPES:
            raise ValueError(f"version {version}, dtype code {code}")
        lengths = np.frombuffer(raw, "<i4", sequences, start)
        offsets = np.frombuffer(raw, "<i8", sequences, start + 4 * sequences)
        bounds = np.frombuffer(raw, "<i8", boundaries, start + 12 * sequences)
        width = np.dtype(_DTYPES[code]).itemsize
        data = (
            np.memmap(path, _DTYPES[code], "r")
            if path.stat().st_size
            else np.empty(0, _DTYPES[code])
        )
        if len(offsets) and int((offsets + lengths.astype(np.int64) * width).max()) > data.nbytes:
            raise ValueError("it points beyond the end of the data")
        if len(bounds) and not 0 <= bounds.min() <= bounds.max() <= sequences:
            raise ValueError("its documents lie outside of its sequences")
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"{where}: {path.with_suffix('.idx')}: not a usable index: {error}"
        ) from error
    for first, last in itertools.pairwise(bounds.tolist()):
        parts = [data[offsets[i] // width :][: lengths[i]] for i in range(first, last)]
        yield np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
