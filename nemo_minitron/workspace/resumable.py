"""Making an artifact that takes long: in place, resumable, and never at the cost of another one's work.

What another recipe has begun, or a training has finished, moves into a sub-folder named by that
recipe; a run with that recipe finds it again. A kill in between leaves nothing that the next run
does not complete.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.atomic import discard
from nemo_minitron.workspace.build import STAMP, building, refuse_unknown_folder, set_aside
from nemo_minitron.workspace.condition import condition, damage, flaws
from nemo_minitron.workspace.layout import (
    LOGS,
    STATE,
    aside_in,
    logs_in,
    manifest_in,
    result_in,
    state_in,
)
from nemo_minitron.workspace.manifest import (
    Input,
    Manifest,
    digest,
    fingerprint,
    now,
    read_manifest,
    write_json,
    write_manifest,
)
from nemo_minitron.workspace.typed_json import read_json


class _Stamp(TypedDict):
    recipe: str


def make_resumable(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Sequence[Input],
    build: Callable[[Path, Path], None],
    keep: bool = False,
) -> bool:
    """Builds an artifact that takes long, in place, so that a killed run resumes where it was.

    Args:
        folder: where it belongs; has no manifest until it is complete.
        kind: what it is.
        config: the part of the configuration that decides its contents.
        inputs: what it is made from.
        build: gets the state folder, as an earlier run with the same recipe left it, and an empty
            folder whose contents become the artifact.
        keep: whether a finished one of another recipe is set aside, too, and comes back with that
            recipe.

    Returns:
        Whether it had to be built.

    Raises:
        ValueError: it is there, is to be kept, and a file of it is not what it was.
    """
    expected = fingerprint(kind, config, inputs)
    found = condition(folder, expected, inputs)
    if found.state == "done":
        return False
    if keep and found.manifest is not None and (flaw := damage(folder, found.manifest)) is not None:
        raise ValueError(
            f"{folder}: a finished training, and {flaw}; put that file back as it was, or remove the folder "
            "to train again from the start"
        )
    refuse_unknown_folder(folder)
    started = now()
    state = _make_room(folder, {"recipe": _recipe(expected, inputs), **config}, keep)
    if state is None:
        return False
    with building(result_in(folder)) as temporary:
        build(state, temporary)
    for child in result_in(folder).iterdir():
        discard(folder / child.name) if child.is_dir() else None
        child.replace(folder / child.name)
    discard(result_in(folder))
    without = (STATE, LOGS, *(path.name for path in set_aside(folder)))
    write_manifest(folder, kind, config, inputs, started, without=without)
    discard(state)
    return True


def _make_room(folder: Path, recipe: dict[str, Any], keep: bool) -> Path | None:
    """The state folder of a recipe, as it was left, or a new one; all else is set aside, or removed.

    None: the recipe's finished artifact was set aside, and is back in its place.
    """
    for aside in () if manifest_in(folder).exists() else set_aside(folder):  # of a killed run
        if (manifest := read_manifest(aside)) is not None:
            _put_aside(manifest, folder, aside)
    if keep:
        _keep_finished(folder, recipe)
    _keep_state(folder, recipe)
    state, aside = state_in(folder), aside_in(folder, recipe["recipe"])
    manifest_in(folder).unlink(missing_ok=True)
    for child in folder.iterdir() if folder.is_dir() else ():
        if child != state and child not in set_aside(folder):
            discard(child) if child.is_dir() else child.unlink()
    manifest = read_manifest(aside)
    if manifest is not None and _whole(aside, manifest):
        _move(manifest, aside, folder)
        _move_logs(aside, folder)  # last: what is killed before it goes back, logs and all
        manifest_in(aside).replace(manifest_in(folder))
        discard(aside)
        return None
    if manifest is not None:
        discard(aside)
    if aside.is_dir():
        aside.rename(state)
    if not state.is_dir():
        state.mkdir(parents=True)
        write_json(state / STAMP, recipe)
    return state


def _keep_finished(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Sets aside what another recipe has finished."""
    manifest = read_manifest(folder)  # damaged it says too little to move, or remove, so much work
    if manifest is None or not _whole(folder, manifest):
        return
    aside = aside_in(folder, _recipe(manifest.fingerprint, manifest.inputs))
    if aside == aside_in(folder, recipe["recipe"]):
        return
    _say(
        folder,
        "made",
        manifest.config,
        recipe,
        f"{aside} and comes back with those",
        " --intermediate",
    )
    discard(aside)
    aside.mkdir()
    manifest_in(folder).replace(
        manifest_in(aside)
    )  # first: what is killed behind it, the next run completes
    _put_aside(manifest, folder, aside)


def _keep_state(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Sets aside what another recipe has begun."""
    state, stamp = state_in(folder), state_in(folder) / STAMP
    found = read_json(stamp, str | _Stamp) if stamp.is_file() else {}
    found = {"recipe": found} if isinstance(found, str) else found  # of version 0.1
    if found.get("recipe") == recipe["recipe"]:
        return
    if not found or not any(child != stamp for child in state.iterdir()):
        discard(state)
        return
    aside = aside_in(folder, found["recipe"])
    if aside.exists():  # finished, and killed before it was tidied away
        discard(state)
        return
    _say(folder, "begun", found, recipe, f"{aside} and goes on where those come back", "")
    state.rename(aside)


def _say(
    folder: Path, how: str, old: Mapping[str, Any], new: Mapping[str, Any], kept: str, level: str
) -> None:
    changes = _changes(old, new)
    why = f"with other settings ({changes})" if changes else "from other inputs"
    text = f"{folder.name}: {how} {why}; that is kept in {kept}; minitron clean{level} removes it"
    print(plain(text), file=sys.stderr)


def _put_aside(manifest: Manifest, folder: Path, aside: Path) -> None:
    """Moves an artifact aside, its logs first: they are its own while a file of it is still to be moved."""
    if any(not (aside / output.file).exists() for output in manifest.outputs):
        _move_logs(folder, aside)
    _move(manifest, folder, aside)


def _move_logs(source: Path, target: Path) -> None:
    if logs_in(source).is_dir() and not logs_in(target).exists():
        logs_in(source).replace(logs_in(target))


def _move(manifest: Manifest, source: Path, target: Path) -> None:
    """Moves an artifact's files, as far as they have not been moved yet."""
    for output in manifest.outputs:
        if (source / output.file).is_file() and not (target / output.file).exists():
            (target / output.file).parent.mkdir(parents=True, exist_ok=True)
            (source / output.file).replace(target / output.file)


def _recipe(expected: str, inputs: Sequence[Input]) -> str:
    """A recipe and what exactly it was applied to."""
    return digest([expected, [item.finished for item in inputs]])


def _whole(folder: Path, manifest: Manifest) -> bool:
    return next(flaws(folder, manifest), None) is None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which settings differ, in words."""
    one, other = _flattened(old), _flattened(new)
    names = sorted(name for name in {*one, *other} - {"recipe"} if one.get(name) != other.get(name))
    differences = [f"{name}: {one.get(name)}, now {other.get(name)}" for name in names[:3]]
    return "; ".join([*differences, *(["..."] if len(names) > 3 else [])])


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings inside settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flattened(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return found
