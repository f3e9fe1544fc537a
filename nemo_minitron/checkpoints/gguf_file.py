"""The header of a GGUF file: metadata and the table of tensors, read and checked without the weights.

Source: ggml's docs/gguf.md, versions 2 and 3, little endian. Long lists of texts (vocabulary and
merges) are passed over unless asked for.
"""

import functools
import hashlib
import math
import mmap
import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.security.plain_text import plain

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_VERSIONS = (2, 3)
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_TEXT, _LIST = 8, 9
_MOST = 2**20
"""Tensors, or entries of metadata, that no real file reaches."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: the file, its place there, its ggml type, its shape, outermost dimension first."""

    file: str
    start: int
    type: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Gguf:
    """What the headers of a model's GGUF files say.

    Attributes:
        files: the files, in order.
        metadata: by key; a long list of texts is its length, unless it was asked for.
        tensors: by name.
        digest: SHA-256 of all headers.
    """

    files: tuple[str, ...]
    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    digest: str

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the kind of model."""
        return str(self.metadata["general.architecture"])


class _Reader:
    """Walks through a header."""

    def __init__(self, data: "mmap.mmap", wanted: Collection[str]) -> None:
        self.data, self.at, self.wanted = data, 0, wanted

    def number(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def count(self, most: int) -> int:
        found: int = self.number("<Q")
        if found > most:
            raise ValueError(f"a count of {found:,}")
        return found

    def text(self) -> str:
        length = self.count(len(self.data) - self.at)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            raise ValueError(f"{plain(key, 80)}: a value of unknown type {kind}")
        inner, length = self.number("<I"), self.count(len(self.data))
        if inner in _NUMBERS:
            form = f"<{length}{_NUMBERS[inner][1]}"
            values = struct.unpack_from(form, self.data, self.at)
            self.at += struct.calcsize(form)
            return list(values)
        if inner != _TEXT:
            raise ValueError(f"{plain(key, 80)}: a list of unknown type {inner}")
        if key in self.wanted or length < 64:
            return [self.text() for _ in range(length)]
        for _ in range(length):
            size = self.count(len(self.data) - self.at)
            self.at += size
        return length


def read_gguf(path: Path, wanted: Collection[str] = ()) -> Gguf:
    """The headers of a model's GGUF file, or of all files of a split set.

    Args:
        path: the file, or any file of the set (``NAME-00001-of-00003.gguf``).
        wanted: keys of long lists of texts that are read.

    Raises:
        ValueError: a file is missing, no GGUF, truncated or damaged; or the set is not whole.
    """
    files = _set_of(path)
    headers = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        state = file.stat()
        headers.append(_header(file, state.st_size, state.st_mtime_ns, tuple(sorted(wanted))))
    metadata, tensors = dict(headers[0].metadata), dict(headers[0].tensors)
    for file, header in zip(files[1:], headers[1:], strict=True):
        twice = sorted(set(tensors) & set(header.tensors))
        if twice:
            raise ValueError(f"{file}: {plain(twice[0], 80)} is in an earlier file of the set, too")
        tensors.update(header.tensors)
    counted = metadata.get("split.tensors.count", len(tensors))
    if counted != len(tensors) or metadata.get("split.count", len(files)) not in (0, len(files)):
        raise ValueError(
            f"{path}: the set should hold {counted} tensors in {metadata.get('split.count')} files, found "
            f"{len(tensors)} in {len(files)}"
        )
    if "general.architecture" not in metadata:
        raise ValueError(f"{path}: no general.architecture, which would name the model's family")
    together = hashlib.sha256("".join(header.digest for header in headers).encode()).hexdigest()
    return Gguf(tuple(map(str, files)), metadata, tensors, together)


def _set_of(path: Path) -> list[Path]:
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    stem, count = found[1], int(found[3])
    if not 1 <= count <= 999:
        raise ValueError(f"{path}: a set of {count} files")
    return [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]


@functools.lru_cache(maxsize=64)
def _header(path: Path, size: int, _changed: int, wanted: tuple[str, ...]) -> Gguf:
    """The header of one file; a checkpoint is opened often, and a vocabulary is long."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            reader = _Reader(data, wanted)
            reader.at = 4
            version = reader.number("<I")
            if version not in _VERSIONS:
                raise ValueError(f"version {version}; 2 and 3 are read")
            tensors, entries = reader.count(_MOST), reader.count(_MOST)
            metadata = {}
            for _ in range(entries):
                key = reader.text()
                metadata[key] = reader.value(reader.number("<I"), key)
            table = [_row(reader) for _ in range(tensors)]
            alignment = metadata.get("general.alignment", 32)
            if type(alignment) is not int or not 1 <= alignment <= 2**20:
                raise ValueError(f"general.alignment {alignment!r:.40}")
            begin = -(-reader.at // alignment) * alignment
            digest = hashlib.sha256(data[: reader.at]).hexdigest()
    except (ValueError, struct.error, OverflowError) as error:
        raise ValueError(f"{path}: truncated, or no GGUF file: {plain(error, 200)}") from error
    found = {
        name: Stored(str(path), begin + offset, kind, shape) for name, kind, shape, offset in table
    }
    _check_places(path, size, found)
    if len(found) != len(table):
        raise ValueError(f"{path}: two tensors of one name")
    return Gguf((str(path),), metadata, found, digest)


def _row(reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
    """Name, ggml type, shape and offset of a tensor."""
    name, dimensions = reader.text(), reader.number("<I")
    if dimensions > 8:
        raise ValueError(f"{plain(name, 80)} has {dimensions} dimensions")
    shape = [reader.count(2**40) for _ in range(dimensions)]
    return name, reader.number("<I"), tuple(reversed(shape)), reader.number("<Q")


def _check_places(path: Path, size: int, tensors: dict[str, Stored]) -> None:
    """Refuses tensors of unknown types, and those that do not lie in the file."""
    for name, stored in tensors.items():
        block, width = block_of(path, name, stored.type)
        columns = stored.shape[-1] if stored.shape else 1
        if columns % block:
            raise ValueError(
                f"{path}: {plain(name, 80)}: {columns} columns are no multiple of its type's {block}"
            )
        end = stored.start + math.prod(stored.shape) // block * width
        if end > size:
            raise ValueError(
                f"{path}: truncated: {plain(name, 80)} ends at byte {end:,}, the file has {size:,}"
            )


def block_of(path: Path, name: str, kind: int) -> tuple[int, int]:
    """Numbers and bytes of a block of a ggml type.

    Raises:
        ValueError: it is not known, or the package gguf makes no numbers of it.
    """
    library = gguf_library()
    try:
        form = library.GGMLQuantizationType(kind)
        return _readable(form)
    except (ValueError, KeyError, NotImplementedError) as error:
        called = form.name if "form" in locals() else kind
        raise ValueError(
            f"{path}: {plain(name, 80)} is of ggml type {called}, which is not read; expected F32, F16, "
            "BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, or a K-quant"
        ) from error


@functools.lru_cache(maxsize=64)
def _readable(form: Any) -> tuple[int, int]:
    import numpy as np

    library = gguf_library()
    block, width = library.GGML_QUANT_SIZES[form]
    library.dequantize(np.zeros((1, width), np.uint8), form)
    return block, width


def gguf_library() -> Any:
    """The package gguf.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "GGUF files need the package gguf: pip install 'nemo-minitron[gguf]'"
        ) from error
    return gguf


def types_of(tensors: Sequence[Stored]) -> str:
    """Names of the ggml types of tensors, those with most numbers first."""
    library, counts = gguf_library(), dict[int, int]()
    for stored in tensors:
        counts[stored.type] = counts.get(stored.type, 0) + math.prod(stored.shape)
    order = sorted(counts, key=lambda kind: -counts[kind])
    return ", ".join(library.GGMLQuantizationType(kind).name for kind in order)
