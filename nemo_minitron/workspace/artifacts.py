"""The artifacts of a workspace: one as the input of another, all of them re-hashed."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from nemo_minitron.workspace.condition import condition, damage, flaws, in_words
from nemo_minitron.workspace.layout import ARTIFACTS, ASIDE, LOGS, MANIFEST, Workspace, manifest_in
from nemo_minitron.workspace.manifest import Input, Output, fingerprint, hash_file, read_manifest
from nemo_minitron.workspace.typed_json import remedy

__all__ = [
    "ARTIFACTS",
    "artifacts_in",
    "check_bytes",
    "check_file",
    "input_artifact",
    "verify",
    "verify_tree",
]


_SMALL = 2**20
"""Bytes: files up to here are hashed wherever their artifact is an input."""


def input_artifact(workspace: Path, name: str, made_by: str) -> Input:
    """An artifact of the workspace as the input of another.

    Raises:
        ValueError: it does not exist yet, what it was made from has changed since, or one of its
            small files has.
    """
    folder = Workspace(workspace).artifact(name)
    found = condition(folder)
    manifest, why = found.manifest, found.why
    if found.state == "absent":
        raise ValueError(
            f"{folder}: not made yet (or not complete); run 'minitron {made_by}' first"
        )
    if manifest is None:
        raise ValueError(in_words(why) if why is not None else f"{folder}: no manifest")
    if found.state == "damaged":
        raise ValueError(
            f"{folder}: damaged: {damage(folder, manifest)}; run 'minitron {made_by}' again"
        )
    if why is not None and why.fault == "unknown":
        raise ValueError(in_words(why))
    if (
        why is not None and why.fault != "rebuilt"
    ):  # a command of one stage takes what its inputs' recipes name
        problem = (
            f"{in_words(why)} than the one there now" if why.fault == "another" else in_words(why)
        )
        raise ValueError(f"{folder}: {problem}; run 'minitron {made_by}' again")
    check_bytes(folder, _SMALL)
    return Input(name, manifest.fingerprint, manifest.finished)


def check_bytes(folder: Path, largest: int | None = None) -> None:
    """Refuses an artifact whose bytes are no longer what its manifest says; without one all is well.

    Args:
        folder: its folder.
        largest: files above so many bytes are not looked at; None: all are.

    Raises:
        ValueError: a file is missing or has changed.
    """
    manifest = read_manifest(folder)
    outputs = () if manifest is None else manifest.outputs
    due = [output for output in outputs if largest is None or output.size <= largest]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(_check, folder), due))


def check_file(path: Path) -> None:
    """The same for one file, which lies directly in an artifact's folder.

    Raises:
        ValueError: it is missing or has changed.
    """
    manifest = read_manifest(path.parent)
    for output in () if manifest is None else manifest.outputs:
        if output.file == path.name:
            _check(path.parent, output)


def _check(folder: Path, output: Output) -> None:
    path = folder / output.file
    if not path.is_file() or hash_file(path) != output.sha256:
        raise ValueError(
            f"{path}: not the file that was made (SHA-256 differs from the manifest's); {remedy(path)}; "
            "'minitron verify' looks at all others"
        )


def artifacts_in(workspace: Path) -> list[Path]:
    """Folders of a workspace that hold a complete artifact, in pipeline order."""
    return [folder for folder in Workspace(workspace).artifacts if manifest_in(folder).is_file()]


def verify(folder: Path) -> list[str]:
    """Re-hashes an artifact.

    Returns:
        One line per defect: a missing, changed or unlisted file; empty where all bytes are what was
            written.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    if manifest is None:
        return [f"{folder}: no {MANIFEST}"]
    found = {flaw.name: flaw for flaw in flaws(folder, manifest)}
    problems = []
    for output in manifest.outputs:
        path = folder / output.file
        if output.file in found:
            problems.append(f"{path}: {in_words(found[output.file])}")
        elif hash_file(path) != output.sha256:
            problems.append(f"{path}: SHA-256 differs from the manifest's")
    listed = {output.file for output in manifest.outputs} | {MANIFEST}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in listed and not name.startswith((ASIDE, f"{LOGS}/")):
            problems.append(f"{path}: not in the manifest")
    if manifest.fingerprint != fingerprint(manifest.kind, manifest.config, manifest.inputs):
        problems.append(
            f"{manifest_in(folder)}: fingerprint does not match its own config and inputs"
        )
    return problems


def verify_tree(path: Path) -> tuple[int, list[str]]:
    """Re-hashes an artifact or all artifacts of a workspace.

    Returns:
        How many artifacts were checked, and one line per defect.

    Raises:
        ValueError: nothing there carries a manifest.
    """
    caches = sorted(found.parent for found in Workspace(path).tokens.glob(f"*/{MANIFEST}"))
    folders = [path] if manifest_in(path).is_file() else [*artifacts_in(path), *caches]
    if not folders:
        raise ValueError(
            f"{path}: no {MANIFEST} here or in its sub-folders; this is neither artifact nor workspace"
        )
    return len(folders), [problem for folder in folders for problem in verify(folder)]
