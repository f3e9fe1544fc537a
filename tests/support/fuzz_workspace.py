"""Damages files of a finished workspace, one at a time, and sees what the commands that read them say.

``cases`` never ends, so that the same can be run with a few inputs in a test and with thousands by
hand: first every way of damaging every file, then files of which one random part is another one.
"""

import contextlib
import io
import itertools
import json
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from nemo_minitron.cli.main import main
from nemo_minitron.workspace.manifest import hash_file

ARTIFACTS = ("teacher", "scores", "plan", "pruned", "student", "scratch", "report", "export")
EVERYWHERE = ("runs", "verify", "report", "clean")
"""Commands that look at every file, or at every artifact."""
READERS = {
    "plan/plan.json": ("prune", "pruned"),
    "plan/keep.safetensors": ("prune", "pruned"),
    "scores/scores.safetensors": ("plan", "plan"),
    "scores/samples.json": ("plan", "plan"),
    "teacher/source.json": ("prune", None),
    "report/report.json": ("export", None),
    "gate.json": ("export", None),
    "student/metrics.jsonl": (None, None),
    "commands.jsonl": (None, None),
    ".holder.json": (None, None),
    **{f"{name}/manifest.json": (None, None) for name in ARTIFACTS},
    "plan/manifest.json": ("prune", "pruned"),
    "scores/manifest.json": ("plan", "plan"),
    "student/manifest.json": ("export", None),
}
"""File to the command that needs what it holds, and what has to go first, so that this command works."""
PAST = ("student/metrics.jsonl", "commands.jsonl", ".holder.json")
"""Files that only tell of the past: nothing is refused for them."""
PYTHON = re.compile(
    r"\b[A-Z][A-Za-z]+(Error|Exception)\b|Traceback|object at 0x|NoneType|<class|subscriptable|unhashable|"
    r"recursion|has no attribute|unexpected keyword|positional argument|not supported between"
)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _part(text: bytes, draw: random.Random, other: Callable[[object], object]) -> bytes:
    """JSON in which one part, wherever it is, is another one."""
    lines = text.split(b"\n") if _is_lines(text) else [text]
    at = draw.randrange(len(lines))
    value = json.loads(lines[at] or b"{}")
    places = list(_places(value))
    if not places:
        return _json(other(value))
    holder, key = draw.choice(places)
    holder[key] = other(holder[key])  # type: ignore[index, call-overload]
    lines[at] = _json(value)
    return b"\n".join(lines)


def _is_lines(text: bytes) -> bool:
    return text.count(b"\n{") > 0


def _places(value: object) -> Iterator[tuple[object, object]]:
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in inside:
        yield value, key
        yield from _places(child)


def _without(text: bytes, draw: random.Random) -> bytes:
    value = json.loads(text.split(b"\n{")[0] if _is_lines(text) else text)
    holders = [holder for holder, _ in _places(value) if isinstance(holder, dict)]
    if holders:
        holder = draw.choice(holders)
        holder.pop(draw.choice(sorted(holder)))
    return _json(value) + b"\n"


def _deep(levels: int) -> object:
    value: object = 0
    for _ in range(levels):
        value = [value]
    return value


Way = Callable[[bytes, random.Random], bytes]
RAW: dict[str, Way] = {
    "empty": lambda text, draw: b"",
    "truncated": lambda text, draw: text[: len(text) * draw.randrange(1, 9) // 10],
    "binary": lambda text, draw: draw.randbytes(200),
    "zeros": lambda text, draw: bytes(len(text)),
    "one byte": lambda text, draw: _flipped(text, draw),
}
JSON: dict[str, Way] = {
    "null": lambda text, draw: b"null\n",
    "list": lambda text, draw: b"[]\n",
    "object": lambda text, draw: b"{}\n",
    "text": lambda text, draw: b'"x"\n',
    "number": lambda text, draw: b"1e999\n",
    "deep": lambda text, draw: b"[" * 100_000,
    "deeper": lambda text, draw: b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n",
    "a part is null": lambda text, draw: _part(text, draw, lambda old: None),
    "a part is a list": lambda text, draw: _part(text, draw, lambda old: [old]),
    "a part is an object": lambda text, draw: _part(text, draw, lambda old: {"x": old}),
    "a part is text": lambda text, draw: _part(text, draw, lambda old: "x\x1b[31m\ud800"),
    "a part is a number": lambda text, draw: _part(text, draw, lambda old: -(10**30)),
    "a part is deep": lambda text, draw: _part(text, draw, lambda old: _deep(200)),
    "a part is missing": _without,
}
TENSORS: dict[str, Way] = {
    "length": lambda text, draw: struct.pack("<Q", draw.getrandbits(62)) + text[8:],
    "header": lambda text, draw: text[:8] + _flipped(text[8:200], draw) + text[200:],
    "none": lambda text, draw: save({}),
    "zeroed": lambda text, draw: _tensor(text, draw, torch.zeros_like),
    "shorter": lambda text, draw: _tensor(text, draw, lambda old: old.flatten()[:1].clone()),
    "reversed": lambda text, draw: _tensor(text, draw, lambda old: old.flatten().flip(0)),
    "numbers": lambda text, draw: _tensor(text, draw, lambda old: old.float() / 0),
    "renamed": lambda text, draw: save({f"{name}.x": value for name, value in load(text).items()}),
    "lacking": lambda text, draw: save(dict(list(load(text).items())[1:])),
}


def _flipped(text: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(text))
    return text[:at] + bytes([text[at] ^ (1 << draw.randrange(8))]) + text[at + 1 :]


def _tensor(
    text: bytes, draw: random.Random, other: Callable[[torch.Tensor], torch.Tensor]
) -> bytes:
    tensors = load(text)
    name = draw.choice(sorted(tensors))
    return save({**tensors, name: other(tensors[name]).contiguous()})


@dataclass(frozen=True)
class Damage:
    """How a file is damaged.

    Attributes:
        file: its path in the workspace.
        how: a name of ``RAW``, ``JSON`` or ``TENSORS``.
        known: whether its artifact's manifest takes the damaged bytes for the true ones.
        seed: what the draws depend on.
    """

    file: str
    how: str
    known: bool
    seed: int

    def apply(self, workspace: Path) -> bool:
        """Damages the file; returns whether it is another one now."""
        path = workspace / self.file
        before = path.read_bytes() if path.is_file() else b"{}\n"
        after = _ways(self.file)[self.how](before, random.Random(self.seed))
        path.write_bytes(after)
        manifest = path.parent / "manifest.json"
        if self.known and manifest.is_file() and path != manifest:
            raw = json.loads(manifest.read_bytes())
            for output in raw["outputs"]:
                if output["file"] == path.name:
                    output.update(size=len(after), sha256=hash_file(path))
            manifest.write_bytes(_json(raw))
        return after != before and not _means_the_same(path.name, before, after)


_OF_THE_MACHINE = ("package", "started", "finished", "machine")
"""Of a manifest: when and where an artifact was made, which nothing is decided by."""


def _means_the_same(name: str, before: bytes, after: bytes) -> bool:
    """Whether two manifests differ only in when and where the artifact was made."""
    try:
        told = [json.loads(text) for text in (before, after)]
        meant = [{k: v for k, v in one.items() if k not in _OF_THE_MACHINE} for one in told]
    except (ValueError, AttributeError, RecursionError):
        return False
    return name == "manifest.json" and meant[0] == meant[1]


def _ways(file: str) -> dict[str, Way]:
    return {**RAW, **(TENSORS if file.endswith(".safetensors") else JSON)}


def cases(seed: int) -> Iterator[tuple[str, Damage]]:
    """Damages by name: every way for every file, in an order that the seed decides, again and again."""
    for turn in itertools.count():
        draw = random.Random(f"{seed} {turn}")
        every = [(file, how) for file in READERS for how in _ways(file)]
        draw.shuffle(every)
        for file, how in every:
            known = draw.random() < 0.5
            told = f"{file}: {how}{', and the manifest agrees' if known else ''}"
            yield told, Damage(file, how, known, draw.getrandbits(32))


def check(finished: Path, place: Path, damage: Damage, settings: Sequence[str]) -> list[str]:
    """What is wrong with how commands take a damage; empty where all is well.

    Args:
        finished: a finished workspace, which is not touched.
        place: where its copy is damaged; replaced.
        damage: how.
        settings: overrides of its run, but for the workspace.
    """
    problems = []
    reader, first = READERS[damage.file]
    for command in (*EVERYWHERE, *([reader] if reader else [])):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(finished, place / "ws", symlinks=True)
        changed = damage.apply(place / "ws")
        damaged = (place / "ws" / damage.file).read_bytes()
        if command == reader and first:
            shutil.rmtree(place / "ws" / first)
        words = {
            "runs": [str(place)], "clean": [str(place / "ws"), "--yes"],
        }.get(command, [str(place / "ws")] if command in EVERYWHERE else [f"workspace={place / 'ws'}", *settings])  # fmt: skip
        code, out, err = run(command, *words)
        there = (place / "ws" / damage.file).is_file()
        stays = there and (place / "ws" / damage.file).read_bytes() == damaged  # not rebuilt
        refused = stays and changed and not damage.known and damage.file not in PAST
        problems += [
            f"{command}: {told}"
            for told in _wrong(damage.file, command, code, out, err, refused and command == reader)
        ]
    return problems


def run(*words: str) -> tuple[int, str, str]:
    """A command in this process: its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()


def _wrong(file: str, command: str, code: int, out: str, err: str, refused: bool) -> Iterator[str]:
    lines = [line for line in err.splitlines() if line.startswith("minitron ")]
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    if code not in ((0, 1) if command == "verify" else (0, 2)):
        yield f"exit code {code}: {err[-300:]}"
    if refused and code != 2:
        yield f"damaged bytes are used unseen: exit code {code}: {err[-300:]}"
    if code == 2 and len(lines) != 1:
        yield f"expected one line, found {err!r}"
    name = Path(file).name
    for line in [*lines, *(note for note in notes if "damaged" in note)]:
        if name not in line and file.split("/")[0] not in line.replace(str(Path("ws")), ""):
            yield f"{file} is not named: {line}"
    if found := PYTHON.search(out + err):
        yield f"a word of Python's, {found[0]!r}: {err[-300:]}"
