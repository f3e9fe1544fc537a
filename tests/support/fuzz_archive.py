"""Seeded damaged .nemo archives: members, the configuration inside, and the bytes of the file."""

import io
import itertools
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.fuzz_checkpoint import VALUES

Builder = Callable[[Path, Path], None]
"""Writes a damaged copy of an archive: from the first path to the second one."""
_NAMES = (
    "../out",
    "/out",
    "model_config.yaml",
    "a/b",
    "x" * 300,
    ".",
    "model.safetensors",
    "\x1b[31m",
)


def cases(seed: int) -> Iterator[tuple[str, Builder]]:
    """Endless damages; the n-th of a seed is always the same one."""
    for number in itertools.count():
        draw = random.Random(f"{seed}-{number}")
        kind = draw.choice((_bytes, _bytes, _members, _config, _config))
        yield (
            f"{kind.__name__[1:]}-{seed}-{number}",
            lambda good, bad, kind=kind, draw=draw: kind(good, bad, draw),
        )


def _bytes(good: Path, bad: Path, draw: random.Random) -> None:
    """Bytes of a header or anywhere else are others, or the end is missing."""
    content = bytearray(good.read_bytes())
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(draw.choice((512, 2048, len(content))))] = draw.randrange(256)
    if draw.random() < 0.4:
        del content[draw.randrange(len(content)) :]
    bad.write_bytes(draw.choice((bytes(content), bytes(content), b"", draw.randbytes(2000))))


def _members(good: Path, bad: Path, draw: random.Random) -> None:
    """Members are left out, come twice, have other names, or are links and pipes."""
    with tarfile.open(good) as old, tarfile.open(bad, "w") as new:
        for member in old.getmembers():
            content = old.extractfile(member).read() if member.isfile() else b""  # type: ignore[union-attr]
            match draw.choice(("keep", "keep", "keep", "drop", "twice", "rename", "type", "cut")):
                case "drop":
                    continue
                case "twice":
                    new.addfile(member, io.BytesIO(content))
                case "rename":
                    member.name = draw.choice(_NAMES)
                case "type":
                    member.type = draw.choice(
                        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
                    )
                    member.linkname, member.size, content = "/etc/passwd", 0, b""
                case "cut":
                    content = content[: len(content) // 2]
                    member.size = len(content)
            new.addfile(member, io.BytesIO(content))


def _config(good: Path, bad: Path, draw: random.Random) -> None:
    """Entries of the configuration, at the top or below, are others."""
    with tarfile.open(good) as old, tarfile.open(bad, "w") as new:
        for member in old.getmembers():
            content = old.extractfile(member).read() if member.isfile() else b""  # type: ignore[union-attr]
            if member.name.endswith("model_config.yaml"):
                config: Any = yaml.safe_load(content)
                for _ in range(draw.randint(1, 2)):
                    place = config
                    while (
                        isinstance(inner := place[draw.choice(sorted(place))], dict)
                        and inner
                        and draw.random() < 0.7
                    ):
                        place = inner
                    place[draw.choice([*sorted(place), "new"])] = draw.choice(VALUES)
                content = yaml.dump(config).encode("utf-8", "surrogatepass")
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
