"""Plain and compressed files, read in bounded parts; one that is cut short or damaged is refused by name."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from nemo_minitron.security.plain_text import plain

CHUNK = 2**20
_INPUT = 1024
"""Compressed bytes at a time: four bytes of zstd may stand for 128 KiB, so that 32 MiB come of them."""
_STREAMS: dict[str, Callable[[], Any]] = {
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".lzma": lzma.LZMADecompressor,
}
COMPRESSED = (*_STREAMS, ".gz", ".zip")
"""Endings of compressed files, in small letters."""
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
        ending = path.suffix.lower()
        with path.open("rb") as file:
            if ending in _STREAMS:
                yield io.BufferedReader(_Streams(file, _STREAMS[ending]), CHUNK)
            elif ending == ".gz":
                yield gzip.GzipFile(fileobj=file)
            elif ending == ".zip":
                with zipfile.ZipFile(file) as archive:
                    yield archive.open(_only_file(archive))
            else:
                yield file
    except PermissionError as error:
        raise ValueError(f"{where}: {plain(path)} may not be read") from error
    except (OSError, *_DAMAGES) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # a disk or a network in trouble, worth another try
            raise OSError(error.errno, error.strerror, str(path)) from error
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
    RuntimeError,  # an encrypted archive
)


def _only_file(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The file of an archive that holds one.

    Raises:
        BadZipFile: it holds none, or several, of which only one would be read.
    """
    files = [
        item for item in archive.infolist()
        if not item.is_dir() and not item.filename.startswith("__MACOSX/")
    ]  # fmt: skip
    if len(files) != 1:
        raise zipfile.BadZipFile(f"an archive of {len(files)} files, expected one; unpack it")
    return files[0]


class _Streams(io.RawIOBase):
    """Decompressed streams (of zstd: frames), one after the other.

    zstandard's own reader takes a cut file for a whole one. Those of Python's bz2 and lzma take a
    stream whose beginning is damaged, and all behind it, for padding: of a file that pbzip2 wrote,
    or of files put together, the rest would be missing in silence.
    """

    def __init__(self, file: IO[bytes], new: Callable[[], Any]) -> None:
        self._file, self._new, self._rest, self._ready = file, new, b"", memoryview(b"")
        self._stream: Any = None
        self._ended = False  # one of them, at least

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            given, self._rest = self._rest or self._file.read(_INPUT), b""
            if not given:
                if self._stream is not None:
                    raise EOFError("the last stream does not end")
                return 0
            if self._stream is None and self._ended and not (given := given.lstrip(b"\0")):
                continue  # padding, as of tapes
            stream = self._stream or self._new()
            self._ready = memoryview(stream.decompress(given))
            self._rest = stream.unused_data if stream.eof else b""
            self._stream = None if stream.eof else stream
            self._ended |= stream.eof
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
