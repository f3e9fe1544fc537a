"""Seeded damaged data files, as many as are asked for: each is readable or refused by its name, nothing else."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

Builder = Callable[[Path], Path]
"""Writes a file (or two) into a folder, and gives the path that names it."""
_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda raw: gzip.compress(raw, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
}
_ODD: list[Any] = [
    None, 0, -1, 10**400, 1e308, True, [], {}, "", " ", "\0", [None], [[]], [{}], {"text": None},
    [{"role": "user"}], [{"role": None, "content": 5}], [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [{"role": "user", "content": "a"}, None],
]  # fmt: skip
_RAW = [
    b"null", b"[", b"]", b"{", b"}", b",", b'"', b"\\u", b'"\\ud800"', b"NaN", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\x00", b"[" * 50_000, b'{"a":' * 50_000, b"[[1]]" * 300, b"1" * 5000, b"nul", b"\r", b"\xe2\x80\xa8",
]  # fmt: skip
_EXTREME = [0, 1, -1, 7, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 10**15, -800]


def cases(seed: int) -> Iterator[tuple[str, Builder]]:
    """Endless damaged files; the n-th case of a seed is always the same one.

    Args:
        seed: seed of all of them.

    Yields:
        A name for messages, and what writes the case into an empty folder.
    """
    for number in itertools.count():
        draw = random.Random(f"{seed}-{number}")
        kind = draw.choice(sorted(_KINDS))
        yield f"{kind}-{seed}-{number}", _builder(kind, draw)


def _builder(kind: str, draw: random.Random) -> Builder:
    state = draw.getstate()

    def build(folder: Path) -> Path:
        own = random.Random()
        own.setstate(state)  # the same each time it is called
        return _KINDS[kind](folder, own)

    return build


def _words(draw: random.Random, most: int = 40) -> str:
    return " ".join(
        draw.choices(("the", "model", "reads", "a", "file", "größer"), k=draw.randint(0, most))
    )


def _row(draw: random.Random) -> Any:
    roles = itertools.cycle(("user", "assistant"))
    talk = [{"role": next(roles), "content": _words(draw, 8)} for _ in range(draw.randint(1, 4))]
    row: dict[str, Any] = draw.choice(({"text": _words(draw)}, {"messages": talk}))
    if draw.random() < 0.1:
        row[draw.choice(("text", "messages", "other"))] = draw.choice(_ODD)
    return draw.choice(_ODD) if draw.random() < 0.02 else row


def _text(folder: Path, draw: random.Random) -> Path:
    raw = "\n".join(_words(draw) for _ in range(draw.randint(0, 50))).encode(
        draw.choice(("utf-8", "latin-1"))
    )
    return _packed(folder, "a.txt", raw, draw)


def _json(folder: Path, draw: random.Random) -> Path:
    rows = [_row(draw) for _ in range(draw.randint(0, 30))]
    if draw.random() < 0.3:
        return _packed(
            folder, "a.json", json.dumps(rows, indent=draw.choice((None, 1))).encode(), draw
        )
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(draw.choice((0, 0, 1, 3))):
        lines.insert(draw.randint(0, len(lines)), draw.choice(_RAW))
    return _packed(folder, "a.jsonl", b"\n".join(lines), draw)


def _packed(folder: Path, name: str, raw: bytes, draw: random.Random) -> Path:
    """Damages what is in the file, or the compressed file, or neither."""
    ending = draw.choice(sorted(_PACKERS))
    where = draw.choice(("inside", "outside", "nowhere"))
    packed = _PACKERS[ending](_damaged(raw, draw) if where == "inside" else raw)
    path = folder / f"{name}{ending}"
    path.write_bytes(_damaged(packed, draw) if where == "outside" else packed)
    return path


def _damaged(raw: bytes, draw: random.Random) -> bytes:
    """One to three cuts, flipped bits, insertions or repetitions."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, len(data))
        end = min(len(data), at + draw.randint(1, 64))
        match draw.choice(("cut", "flip", "zero", "insert", "drop", "repeat", "empty")):
            case "cut":
                del data[at:]
            case "flip" if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case "zero":
                data[at:end] = bytes(end - at)
            case "insert":
                data[at:at] = draw.choice((draw.choice(_RAW), draw.randbytes(draw.randint(1, 40))))
            case "drop":
                del data[at:end]
            case "repeat":
                data[at:at] = data[at:end]
            case "empty" if draw.random() < 0.2:
                data.clear()
    return bytes(data)


def _parquet(folder: Path, draw: random.Random) -> Path:
    import pyarrow
    import pyarrow.parquet

    column = draw.choice(("text", "messages", "other"))
    values: list[Any] = [_words(draw) for _ in range(draw.randint(0, 30))]
    if values and draw.random() < 0.3:
        values[draw.randrange(len(values))] = None
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({column: pyarrow.array(values, pyarrow.string())}), file
    )
    raw = file.getvalue()
    path = folder / "a.parquet"
    path.write_bytes(_damaged(raw, draw) if draw.random() < 0.8 else raw)
    return path


def _megatron(folder: Path, draw: random.Random) -> Path:
    """An indexed data set with a few numbers of its index replaced, or with a damaged file."""
    width, code = draw.choice((("<u2", 8), ("<i4", 4), ("<i8", 5)))
    sequences = [
        np.array([draw.randrange(300) for _ in range(draw.randint(0, 20))], width) for _ in range(9)
    ]
    ids = b"".join(array.tobytes() for array in sequences)
    lengths = [len(array) for array in sequences]
    offsets = np.cumsum([0, *[array.nbytes for array in sequences]])[:-1].tolist()
    bounds = [0, *sorted(draw.sample(range(1, 9), 3)), 9]
    header = [1, code, len(lengths), len(bounds)]
    for _ in range(draw.choice((0, 1, 1, 2))):
        numbers = draw.choice((lengths, offsets, bounds, header))
        numbers[draw.randrange(len(numbers))] = draw.choice(_EXTREME)
    index = b"MMIDIDX\x00\x00" + struct.pack(
        "<QBQQ", header[0] % 2**64, header[1] % 256, header[2] % 2**64, header[3] % 2**64
    )
    index += np.array([number % 2**32 for number in lengths], "<u4").tobytes()
    index += np.array([number % 2**64 for number in offsets], "<u8").tobytes()
    index += np.array([number % 2**64 for number in bounds], "<u8").tobytes()
    if draw.random() < 0.3:
        index = index[:9] + _damaged(index[9:], draw)
    (folder / "a.bin").write_bytes(_damaged(ids, draw) if draw.random() < 0.2 else ids)
    (folder / "a.idx").write_bytes(index)
    return folder / "a.bin"


_KINDS: dict[str, Callable[[Path, random.Random], Path]] = {
    "text": _text,
    "json": _json,
    "parquet": _parquet,
    "megatron": _megatron,
}
