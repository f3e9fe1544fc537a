"""The artifacts of a workspace: one as the input of another, all of them re-hashed."""

from pathlib import Path

from nemo_minitron.workspace.manifest import Input, damage, read_manifest, verify

ARTIFACTS = (
    "pretrain",
    "teacher",
    "correct",
    "scores",
    "plan",
    "pruned",
    "logits",
    "student",
    "scratch",
    "report",
    "export",
)
"""Sub-folders of a workspace that can hold an artifact, in the order in which they are made."""


def input_artifact(workspace: Path, name: str, made_by: str) -> Input:
    """An artifact of the workspace as the input of another.

    Raises:
        ValueError: it does not exist yet, or what it was made from has changed since.
    """
    manifest = read_manifest(workspace / name)
    if manifest is None:
        raise ValueError(
            f"{workspace / name}: not made yet (or not complete); run 'minitron {made_by}' first"
        )
    damaged = damage(workspace / name, manifest)
    if damaged is not None:
        raise ValueError(f"{workspace / name}: damaged: {damaged}; run 'minitron {made_by}' again")
    for item in manifest.inputs:
        inside = (
            item.path in ARTIFACTS and item.finished is not None
        )  # else a folder outside, of the same name
        upstream = read_manifest(workspace / item.path) if inside else None
        if upstream is not None and upstream.fingerprint != item.fingerprint:
            raise ValueError(
                f"{workspace / name}: made from another {item.path} than the one there now; "
                f"run 'minitron {made_by}' again"
            )
    return Input(name, manifest.fingerprint, manifest.finished)


def artifacts_in(workspace: Path) -> list[Path]:
    """Folders of a workspace that hold a complete artifact, in pipeline order."""
    return [workspace / name for name in ARTIFACTS if (workspace / name / "manifest.json").is_file()]


def verify_tree(path: Path) -> tuple[int, list[str]]:
    """Re-hashes an artifact or all artifacts of a workspace.

    Returns:
        How many artifacts were checked, and one line per defect.

    Raises:
        ValueError: nothing there carries a manifest.
    """
    caches = sorted(found.parent for found in path.glob("tokens/*/manifest.json"))
    folders = [path] if (path / "manifest.json").is_file() else [*artifacts_in(path), *caches]
    if not folders:
        raise ValueError(
            f"{path}: no manifest.json here or in its sub-folders; this is neither artifact nor workspace"
        )
    return len(folders), [problem for folder in folders for problem in verify(folder)]
