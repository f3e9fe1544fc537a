"""The header of a safetensors file: read and checked without touching the weights."""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.dtypes import BYTES
from nemo_minitron.security.plain_text import plain, refuse_half_characters

_SAMPLE = 512
"""Bytes of each tensor that tell it from another of the same name and shape."""


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and where its tensors begin.

    Raises:
        ValueError: the file is truncated, has trailing bytes, or its header is not one of
            safetensors; each tensor's span must be as long as its dtype and shape say, and no two
            may overlap.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, 100 * 2**20):
                raise ValueError("header is longer than the file")
            content = file.read(length)
            header = json.loads(content)
            refuse_half_characters(content, header)
        spans = sorted(_span(name, item) for name, item in header.items() if name != "__metadata__")
        end = 0
        for begin, stop in spans:
            if begin != end:
                raise ValueError(f"tensors overlap or leave a gap at byte {begin}")
            end = stop
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        struct.error,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file: {plain(error, 400)}"
        ) from error
    if 8 + length + end != size:
        raise ValueError(f"{path}: truncated: expected {8 + length + end} bytes, found {size}")
    return dict(header), 8 + length


def sample(path: Path, header: Mapping[str, Any]) -> str:
    """SHA-256 over some bytes from the middle of every tensor, in hexadecimal.

    Args:
        path: a safetensors file.
        header: what ``read_header`` gave for it.
    """
    with path.open("rb") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
    spans = sorted(item["data_offsets"] for name, item in header.items() if name != "__metadata__")
    return sample_of(path, [(start + begin, start + end) for begin, end in spans])


def sample_of(path: Path, spans: Iterable[tuple[int, int]]) -> str:
    """SHA-256 over some bytes from the middle of every span of a file, in hexadecimal."""
    digester = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for begin, end in spans:
            middle = max(begin, (begin + end - _SAMPLE) // 2)
            file.seek(middle)
            digester.update(file.read(min(_SAMPLE, end - middle)))
    return digester.hexdigest()


def _span(name: str, item: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = item["data_offsets"]
    shape = item["shape"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name}: shape and offsets must be whole numbers")
    if not isinstance(item["dtype"], str):
        raise ValueError(f"{name}: dtype must be a name")
    width = BYTES.get(item["dtype"])
    if end < begin or (width is not None and end - begin != width * math.prod(shape)):
        raise ValueError(
            f"{name}: {end - begin} bytes do not hold {item['dtype']} of shape {shape}"
        )
    return begin, end
