"""The manifest of an artifact: what it is, what it was made from, and the bytes it consists of.

A folder without ``manifest.json`` is no artifact. Stages build into a temporary neighbour, which is renamed into place
with its manifest inside: whatever interrupts them, nothing that looks finished is incomplete. A stage whose artifact
already carries the fingerprint it would get, and is not older than its inputs, has nothing to do: this is the only
cache.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nemo_minitron

SCHEMA = 1
NAME = "manifest.json"
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class Input:
    """Something an artifact was made from: an artifact of the workspace, or a checkpoint or data outside it.

    Attributes:
        path: where it lay; relative to the workspace where it is inside.
        fingerprint: its fingerprint then.
        finished: when it was finished (UTC, ISO 8601), or None for what has no manifest.
    """

    path: str
    fingerprint: str
    finished: str | None = None


@dataclass(frozen=True)
class Output:
    """One file of an artifact: path inside the folder, size in bytes, SHA-256."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``; ``fingerprint`` identifies the recipe, ``outputs`` the bytes."""

    kind: str
    schema: int
    package: str
    config: Mapping[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    fingerprint: str
    started: str
    finished: str
    machine: Mapping[str, str]


def now() -> str:
    """The time in UTC, ISO 8601 with microseconds."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat()


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(kind: str, config: Mapping[str, Any], inputs: Sequence[Input]) -> str:
    """Identity of an artifact before it exists: its kind, schema, resolved config and its inputs' fingerprints."""
    return digest([kind, SCHEMA, config, [item.fingerprint for item in inputs]])


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digester = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digester.update(block)
    return digester.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where it is no artifact.

    Raises:
        ValueError: the file is there but is no manifest of this schema.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["inputs"] = tuple(Input(**item) for item in raw["inputs"])
        raw["outputs"] = tuple(Output(**item) for item in raw["outputs"])
        return Manifest(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a manifest of schema {SCHEMA}: {error}") from error


def is_done(folder: Path, expected: str, inputs: Sequence[Input]) -> bool:
    """Whether the artifact in ``folder`` is what a stage would make now.

    Its fingerprint must match, its files must be there in the right sizes, and no input may have been made anew since:
    a fingerprint names the recipe, not the bytes, and a rebuilt input may differ in bytes.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    if manifest is None or manifest.schema != SCHEMA or manifest.fingerprint != expected:
        return False
    if any(item.finished is not None and item.finished > manifest.started for item in inputs):
        return False
    return all(_has_size(folder / output.file, output.size) for output in manifest.outputs)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def list_outputs(folder: Path, known: Mapping[str, str], without: Sequence[str] = ()) -> tuple[Output, ...]:
    """Every file below a folder with size and hash, except the manifest.

    Args:
        folder: the artifact's folder.
        known: hashes that are known already, by path inside the folder.
        without: names of sub-folders that are not part of the artifact.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in (*without, NAME)
    )
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(lambda name: known[name] if name in known else hash_file(folder / name), names)
        return tuple(
            Output(name, (folder / name).stat().st_size, value)
            for name, value in zip(names, hashes, strict=True)
        )


def write_manifest(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Sequence[Input],
    started: str,
    known: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
) -> Manifest:
    """Completes an artifact: hashes its files and writes ``manifest.json`` last and atomically."""
    import torch

    manifest = Manifest(
        kind=kind,
        schema=SCHEMA,
        package=nemo_minitron.__version__,
        config=config,
        inputs=tuple(inputs),
        outputs=list_outputs(folder, known or {}, without),
        fingerprint=fingerprint(kind, config, inputs),
        started=started,
        finished=now(),
        machine={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
        },
    )
    write_json(folder / NAME, asdict(manifest))
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes when not.

    Leftovers of a killed run are cleared first. The caller writes the manifest inside the block.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    discard(temporary)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        discard(temporary)
        raise
    discard(target)
    temporary.rename(target)


def discard(folder: Path) -> None:
    """Removes an artifact; its manifest goes first, so that a part of it is never taken for the whole."""
    if folder.exists():
        (folder / NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def verify(folder: Path) -> list[str]:
    """Re-hashes an artifact.

    Returns:
        One line per defect: a missing, changed or unlisted file; empty where all bytes are what was written.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder}: no {NAME}"]
    problems = []
    for output in manifest.outputs:
        path = folder / output.file
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != output.size:
            problems.append(f"{path}: expected {output.size} bytes, found {path.stat().st_size}")
        elif hash_file(path) != output.sha256:
            problems.append(f"{path}: SHA-256 differs from the manifest's")
    if manifest.fingerprint != fingerprint(manifest.kind, manifest.config, manifest.inputs):
        problems.append(f"{folder / NAME}: fingerprint does not match its own config and inputs")
    return problems


def make(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Sequence[Input],
    build: Callable[[Path], Mapping[str, str] | None],
) -> bool:
    """Builds an artifact unless it is there already.

    Args:
        folder: where it belongs.
        kind: what it is.
        config: the part of the configuration that decides its contents.
        inputs: what it is made from.
        build: fills a temporary folder; may return hashes that it knows, by file name.

    Returns:
        Whether it had to be built.
    """
    if is_done(folder, fingerprint(kind, config, inputs), inputs):
        return False
    started = now()
    with building(folder) as temporary:
        known = build(temporary)
        write_manifest(temporary, kind, config, inputs, started, known)
    return True


STATE = "state"
"""Sub-folder of an artifact in the making that survives interruption: what a training resumes from."""


def make_resumable(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Sequence[Input],
    build: Callable[[Path, Path], None],
) -> bool:
    """Builds an artifact that takes long, in place, so that a killed run goes on where it was.

    Args:
        folder: where it belongs; has no manifest until it is complete.
        kind: what it is.
        config: the part of the configuration that decides its contents.
        inputs: what it is made from.
        build: gets the state folder, as an earlier run with the same recipe left it, and an empty folder whose
            contents become the artifact.

    Returns:
        Whether it had to be built.
    """
    expected = fingerprint(kind, config, inputs)
    if is_done(folder, expected, inputs):
        return False
    started = now()
    state = folder / STATE
    recipe = digest([expected, [item.finished for item in inputs]])
    stamp = state / "recipe.json"
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != recipe:
        discard(folder)
        state.mkdir(parents=True)
        write_json(stamp, recipe)
    with building(folder / "result") as temporary:
        build(state, temporary)
    for child in (folder / "result").iterdir():
        discard(folder / child.name) if child.is_dir() else None
        child.replace(folder / child.name)
    discard(folder / "result")
    write_manifest(folder, kind, config, inputs, started, without=(STATE,))
    discard(state)
    return True
