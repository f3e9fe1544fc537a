"""Plain and compressed files, read in bounded parts; one that is cut short or damaged is refused by name."""

import codecs
import contextlib
import io
import lzma
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard
from fsspec.compression import compr
from fsspec.utils import infer_compression

from nemo_minitron.security.plain_text import plain

CHUNK = 2**20
_ZST_INPUT = 1024
"""Compressed bytes at a time: a block of four bytes may stand for 128 KiB, so that 32 MiB come of them."""
_REPLACEMENT = "\ufffd"
_NOTES = 8
"""How many files are named of each thing that is worth a note."""
_told: set[tuple[str, Path]] = set()
_counted: Counter[str] = Counter()


@contextlib.contextmanager
def opened(path: Path, where: str) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed where its name says how; the name itself is never taken for an address.

    Args:
        path: the file.
        where: configuration section, for messages.

    Raises:
        ValueError: the file is damaged, is cut short, or may not be read; also while it is read.
    """
    try:
        compression = infer_compression(str(path))
        with path.open("rb") as file:
            if compression == "zstd":
                yield io.BufferedReader(_Zstandard(file), CHUNK)
            elif compression is None:
                yield file
            else:
                yield compr[compression](file, mode="rb")
    except PermissionError as error:
        raise ValueError(f"{where}: {plain(path)} may not be read") from error
    except (OSError, *_DAMAGES) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk or a network in trouble, worth another try
        raise ValueError(
            f"{where}: {plain(path)} is damaged or cut short: {plain(error, 200) or 'nothing in it'}"
        ) from error


_DAMAGES = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    zipfile.BadZipFile,
    NotImplementedError,  # a way of compression that zipfile does not know
    IndexError,  # an archive without files
    RuntimeError,  # an encrypted archive
)


class _Zstandard(io.RawIOBase):
    """Decompressed frames, one after the other; zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._rest, self._ready = file, b"", memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            given = self._rest or self._file.read(_ZST_INPUT)
            if not given:
                if self._frame is not None:
                    raise EOFError("the last frame does not end")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(frame.decompress(given))
            self._rest = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def text_chunks(path: Path, where: str) -> Iterator[str]:
    """A file's text in parts; what is not UTF-8 comes as U+FFFD, which is worth a note.

    Raises:
        ValueError: the file is damaged, or is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    replaced = 0
    try:
        with opened(path, where) as file:
            while True:
                raw = file.read(CHUNK)
                if b"\0" in raw:
                    raise ValueError(f"{where}: {plain(path)} is not text")
                text = decoder.decode(raw, final=not raw)
                if _REPLACEMENT in text:
                    replaced += text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())
                if text:
                    yield text
                if not raw:
                    return
    finally:
        if replaced > 0:
            kind = "is not UTF-8: what could not be read is replaced by U+FFFD; save it as UTF-8"
            note(path, where, kind, f"{replaced:,} times so far")


def note(path: Path, where: str, kind: str, more: str = "") -> None:
    """Says something of a file on standard error, once, and of the first few files only."""
    if (kind, path) in _told:
        return
    _told.add((kind, path))
    _counted[kind] += 1
    if _counted[kind] <= _NOTES:
        print(f"{where}: {plain(path)} {kind}" + (f" ({more})" if more else ""), file=sys.stderr)
    if _counted[kind] == _NOTES:
        print(f"{where}: no further file is named that {kind}", file=sys.stderr)
