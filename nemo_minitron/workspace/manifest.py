"""The manifest of an artifact: what it is, what it was made from, and the bytes it consists of.

A folder without ``manifest.json`` is no artifact. Stages build into a temporary neighbour, which is
renamed into place with its manifest inside: whatever interrupts them, nothing that looks finished
is incomplete. A stage whose artifact already carries the fingerprint it would get, and is not older
than its inputs, has nothing to do: this is the only cache.
"""

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import nemo_minitron
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.atomic import replacing
from nemo_minitron.workspace.layout import MANIFEST, manifest_in
from nemo_minitron.workspace.typed_json import read_json, remedy

SCHEMA = 1
NAME = MANIFEST
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
    """Identity of an artifact before it exists.

    Its kind, schema, resolved config and its inputs' fingerprints.
    """
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
    path = manifest_in(folder)
    if not path.is_file():
        return None
    otherwise = f"not a manifest of schema {SCHEMA}"
    manifest: Manifest = read_json(path, Manifest, otherwise)
    try:
        for output in manifest.outputs:
            if PurePosixPath(output.file).is_absolute() or ".." in PurePosixPath(output.file).parts:
                raise ValueError(f"{plain(output.file, 80)!r} lies outside of the folder")
        _check_time(manifest.finished)
    except ValueError as error:
        raise ValueError(f"{path}: {otherwise}: {error}; {remedy(path)}") from None
    return manifest


def _check_time(text: str) -> None:
    """Refuses what is no time as ``now`` writes it.

    Raises:
        ValueError: it is none.
    """
    try:
        known = datetime.datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"finished: expected a time with its zone, found {plain(text, 60)!r}")


def list_outputs(
    folder: Path, known: Mapping[str, str], without: Sequence[str] = ()
) -> tuple[Output, ...]:
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
        hashes = pool.map(
            lambda name: known[name] if name in known else hash_file(folder / name), names
        )
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
    write_json(manifest_in(folder), asdict(manifest))
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
