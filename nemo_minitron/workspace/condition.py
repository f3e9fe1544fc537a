"""Whether an artifact is still good: decided here, and put into words by whoever asks.

A fingerprint names the recipe, not the bytes: an input that was rebuilt may differ in bytes under
the same fingerprint. So an artifact is good if its files are there in their sizes, its recipe is
the one that is asked for, and none of its inputs has changed, or was finished at another time than
the one that it was made from. Which of two times is the later one is never asked where that is
known: the clock of a machine may have been wrong.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_minitron.security.links import leads_out
from nemo_minitron.workspace.layout import ARTIFACTS, manifest_in
from nemo_minitron.workspace.manifest import SCHEMA, Input, Manifest, fingerprint, read_manifest
from nemo_minitron.workspace.typed_json import remedy

State = Literal["absent", "damaged", "stale", "done"]
Fault = Literal[
    "unreadable", "missing", "outside", "size", "schema", "recipe", "another", "rebuilt", "unknown"
]


@dataclass(frozen=True)
class Why:
    """What is wrong with an artifact.

    Attributes:
        fault: ``unreadable``: its manifest; ``missing``, ``outside``, ``size``: a file that is not
            there, is a link out of the folder, or has another size; ``schema``, ``recipe``: made by
            another one; ``another``, ``rebuilt``: an input is not the one it was made from, or was
            made once more since; ``unknown``: an input's manifest cannot be read.
        name: the file, or the input; empty where it is the whole.
        expected: what it should be, by its manifest or who asks; empty where there is nothing to
            compare.
        found: what it is: bytes, a place, a schema, or the text of an error.
    """

    fault: Fault
    name: str = ""
    expected: str | int = ""
    found: str | int = ""


@dataclass(frozen=True)
class Condition:
    """How an artifact stands.

    Attributes:
        state: ``absent``: nothing is there, or it is in the making; ``damaged``: manifest or a file
            is not what it was; ``stale``: whole, but a run would rebuild it; ``done``.
        why: the first thing that is wrong; None for what is absent, and for what is done, unless an
            input's manifest cannot be read: then nothing speaks against it, and nothing for it.
        manifest: its manifest, where it can be read.
    """

    state: State
    why: Why | None = None
    manifest: Manifest | None = None


def condition(folder: Path, expected: str | None = None, inputs: Sequence[Input] = ()) -> Condition:
    """How the artifact in a folder stands.

    Args:
        folder: its folder, in its workspace.
        expected: the fingerprint that it would get now. None: its own, held against the artifacts
            of the workspace that it names as its inputs; what lies outside of the workspace is not
            looked at.
        inputs: what it would be made from, or is to be made from: none of them may have been rebuilt
            since. Without ``expected`` each must be among its own inputs.

    Raises:
        OSError: the system refuses to tell.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return Condition("damaged", Why("unreadable", found=str(error)))
    if manifest is None:
        return Condition("absent")
    if manifest.schema == SCHEMA and manifest.fingerprint != _own_fingerprint(manifest):
        path = manifest_in(folder)
        problem = (
            f"{path}: its fingerprint is not that of its own config and inputs; {remedy(path)}"
        )
        return Condition("damaged", Why("unreadable", found=problem))
    if (flaw := next(flaws(folder, manifest), None)) is not None:
        return Condition("damaged", flaw, manifest)
    why = _outdated(manifest, expected, inputs)
    if why is None and expected is None:
        why = _overtaken(folder.parent, manifest)
    return Condition(
        "stale" if why is not None and why.fault != "unknown" else "done", why, manifest
    )


def _own_fingerprint(manifest: Manifest) -> str:
    return fingerprint(manifest.kind, manifest.config, manifest.inputs)


def flaws(folder: Path, manifest: Manifest) -> Iterator[Why]:
    """What is wrong with an artifact's files at a glance, by their places and sizes, one for each of them."""
    for output in manifest.outputs:
        path = folder / output.file
        if not path.is_file():
            yield Why("missing", output.file)
        elif leads_out(path, folder):
            yield Why("outside", output.file, found=str(path.resolve()))
        elif (size := path.stat().st_size) != output.size:
            yield Why("size", output.file, output.size, size)


def _outdated(manifest: Manifest, expected: str | None, inputs: Sequence[Input]) -> Why | None:
    """Why an artifact is not the one that is asked for."""
    if manifest.schema != SCHEMA:
        return Why("schema", "", SCHEMA, manifest.schema)
    if expected is not None and manifest.fingerprint != expected:
        return Why("recipe", "", expected, manifest.fingerprint)
    for item in inputs:
        own = [one for one in manifest.inputs if one.path == item.path]
        if expected is None and item.fingerprint not in [one.fingerprint for one in own]:
            return Why("another", item.path)
        if expected is None and item.finished not in [one.finished for one in own]:
            return Why("rebuilt", item.path)
        if item.finished is not None and rebuilt_since(item.path, item.finished, manifest):
            return Why("rebuilt", item.path)
    return None


def rebuilt_since(path: str, finished: str, manifest: Manifest) -> bool:
    """Whether an input that was finished then is another than the one that an artifact was made from."""
    known = [item.finished for item in manifest.inputs if item.path == path and item.finished]
    return finished not in known if known else finished > manifest.started


def _overtaken(workspace: Path, manifest: Manifest) -> Why | None:
    """Why an artifact is not made from what lies in its workspace now: another input before a newer one."""
    found: list[Why] = []
    for item in manifest.inputs:
        name, _, part = item.path.partition(
            "/"
        )  # pretrain/hf: the model in an artifact, with its own print
        if item.finished is None or name not in ARTIFACTS:
            continue  # without a time it is nothing of the workspace, whatever the user calls it
        try:
            upstream = read_manifest(workspace / name)
        except (OSError, ValueError) as error:
            found += [] if part else [Why("unknown", name, found=str(error))]
            continue
        if upstream is None:
            continue
        if not part and upstream.fingerprint != item.fingerprint:
            found.append(Why("another", name))
        elif rebuilt_since(item.path, upstream.finished, manifest):
            found.append(Why("rebuilt", name))
    order: tuple[Fault, ...] = ("another", "rebuilt", "unknown")
    return min(found, key=lambda why: order.index(why.fault), default=None)


_WORDS = {
    "unreadable": "{0.found}",
    "missing": "missing",
    "outside": "lies outside of the folder, at {0.found}",
    "size": "expected {0.expected} bytes, found {0.found}",
    "schema": "made by schema {0.found}, now {0.expected}",
    "recipe": "made by another recipe",
    "another": "made from another {0.name}",
    "rebuilt": "{0.name} was rebuilt",
    "unknown": "{0.found}",
}


def in_words(why: Why) -> str:
    """What is wrong, in words; of a file without its name."""
    return _WORDS[why.fault].format(why)


def damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with an artifact's files at a glance, by their places and sizes; None: nothing."""
    return next(
        (f"{flaw.name} {_IS[flaw.fault].format(flaw)}" for flaw in flaws(folder, manifest)), None
    )


_IS = {
    "missing": "is missing",
    "outside": "lies outside of the folder, at {0.found}",
    "size": "has {0.found} bytes, expected {0.expected}",
}
