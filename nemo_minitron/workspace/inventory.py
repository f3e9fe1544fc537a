"""What lies in workspaces: which there are, how far each has come, and what of it can be made again.

Links are seen and not followed: what lies elsewhere is neither counted nor removed. Another process
may be at work in any of the folders: what vanishes between two looks was not there.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from nemo_minitron.workspace import training_log
from nemo_minitron.workspace.atomic import discard, is_leftover, leftovers_of, temporary_of
from nemo_minitron.workspace.build import set_aside
from nemo_minitron.workspace.condition import Condition, condition, in_words
from nemo_minitron.workspace.layout import (
    ARTIFACTS,
    COMMANDS,
    DATA_COMMITS,
    IDS,
    LIVE,
    LOCK,
    MODEL,
    RESULTS,
    STAGE_LOCK,
    TOKENS,
    UNPACKED,
    Workspace,
    build_lock_of,
    manifest_in,
    metrics_in,
    state_in,
)

LEVELS = ("caches", "intermediate")
"""How much ``rubbish`` takes."""
KEPT = ("plan", "report", "export")
"""Artifacts that stay at every level."""
BESIDE = {
    TOKENS: (IDS, "text as token ids; the next training reads the text again"),
    LIVE: ("config.json", "a model that teacher correction published"),
    UNPACKED: (MODEL, "a model unpacked from its .nemo archive"),
}
"""Folders of a workspace beside its artifacts: by what a folder in them is known as a run's, what it is."""
LOCKS = (LOCK, STAGE_LOCK)
"""Held by a run, and by the process of a stage, which may live a little longer."""
_OWN = (*ARTIFACTS, *BESIDE, DATA_COMMITS, RESULTS)
_STRANGE = (OSError, ValueError)  # what a file leads to that is no manifest


@dataclass(frozen=True)
class Artifact:
    """An artifact of a workspace: its folder's name, the bytes of all its files, and how it stands.

    Attributes:
        state: ``done``; ``stale``: an input has changed, a run would rebuild it; ``damaged``:
            manifest or a file is not what it was; ``unfinished``: in the making.
        finished: when it was finished (UTC), or None.
        detail: what is wrong with it, or how far it is, as in "step 120"; may be empty.
    """

    name: str
    state: str
    bytes: int
    finished: datetime | None
    detail: str


@dataclass(frozen=True)
class Found:
    """A workspace that was found: its folder, the bytes of all its files, what is there in pipeline order.

    Attributes:
        changed: when the last of its files was written (UTC); locks do not count.
        held: whether a process is at work in it.
    """

    path: Path
    bytes: int
    changed: datetime
    held: bool
    artifacts: tuple[Artifact, ...]


@dataclass(frozen=True)
class Item:
    """Something that can go: its path, the bytes that this frees, and what it is."""

    path: Path
    bytes: int
    why: str


def is_workspace(folder: Path) -> bool:
    """Whether a folder holds an artifact, one in the making, or the commands that worked there."""
    return os.path.isfile(Workspace(folder).commands) or any(
        _begun(folder, name) for name in ARTIFACTS
    )


def workspaces(root: Path) -> list[Found]:
    """The workspaces at a folder and up to three levels below it, by path.

    Hidden folders are not searched, nor those that a run makes inside its workspace.
    """
    root, found = Path(os.path.realpath(root)) if os.path.islink(root) else root, []
    for at, below, _ in os.walk(root):  # follows no links, and passes over what it cannot read
        here, deep = is_workspace(Path(at)), len(Path(at).relative_to(root).parts)
        if here:
            found.append(Path(at))
        below[:] = [
            name for name in below if deep < 3 and name[0] != "." and not (here and name in _OWN)
        ]
    return [_look(folder) for folder in sorted(found)]


def _look(folder: Path) -> Found:
    size, _, newest = _measure(folder)
    there = tuple(found for name in ARTIFACTS if (found := _artifact(folder, name)))
    held, changed = (
        any(_held(folder / lock) for lock in LOCKS),
        datetime.fromtimestamp(newest, timezone.utc),
    )
    return Found(folder, size, changed, held, there)


def _artifact(workspace: Path, name: str) -> Artifact | None:
    if not _begun(workspace, name):
        return None
    folder = Workspace(workspace).artifact(name)
    size, _, _ = _measure(folder, temporary_of(folder))
    try:
        found = condition(folder)
        if found.state == "absent":
            return Artifact(
                name, "unfinished", size, None, _last_step(metrics_in(state_in(folder)))
            )
        finished = (
            None if found.manifest is None else datetime.fromisoformat(found.manifest.finished)
        )
        return Artifact(name, found.state, size, finished, _detail(found))
    except _STRANGE as error:
        return Artifact(name, "damaged", size, None, " ".join(str(error).split()))


def _begun(workspace: Path, name: str) -> bool:
    """Whether an artifact is there or in the making; otherwise a folder of its name is not a run's."""
    folder = Workspace(workspace).artifact(name)
    places = (manifest_in(folder), state_in(folder), temporary_of(folder))
    return any(os.path.exists(place) for place in places) or bool(set_aside(folder))


def _detail(found: Condition) -> str:
    """What is wrong with an artifact, in words."""
    if found.why is None or found.state == "done":
        return ""
    words = in_words(found.why)
    return (
        f"{found.why.name}: {words}" if found.why.fault in ("missing", "outside", "size") else words
    )


def _last_step(path: Path) -> str:
    steps = [line["step"] for line in training_log.read_log(path)]
    return f"logged up to step {max(steps)}" if steps else ""


def _held(lock: Path) -> bool:
    """Whether a process holds a lock file; where there was none there is none afterwards."""
    if not os.path.isfile(lock):
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except OSError as error:  # another than Timeout: of another user, and nobody here can tell
        return isinstance(error, Timeout)


def _stat(path: Path, follow: bool) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError):
        return None


def _measure(*paths: Path) -> tuple[int, int, float]:
    """Bytes of all files, one with several names once; of those without other names; newest time, seconds."""
    walked = [entry for path in paths if not os.path.islink(path) for entry in os.walk(path)]
    places = [*paths, *(Path(at, name) for at, _, names in walked for name in names)]
    found = [(place, stats) for place in places if (stats := _stat(place, follow=False))]
    files = [(place, stats) for place, stats in found if stat.S_ISREG(stats.st_mode)]
    names = Counter((stats.st_dev, stats.st_ino) for _, stats in files)
    sizes = {(stats.st_dev, stats.st_ino): (stats.st_size, stats.st_nlink) for _, stats in files}
    freed = sum(size for key, (size, links) in sizes.items() if names[key] >= links)
    written = [file for file in files if not file[0].name.endswith(LOCK)] or found
    newest = max((stats.st_mtime for _, stats in written), default=0.0)
    return sum(size for size, _ in sizes.values()), freed, newest


def rubbish(workspace: Path, level: str = "caches") -> list[Item]:
    """What can be removed and made again; the caller holds the workspace's lock.

    ``caches`` costs no finished training: leftovers of killed builds, what was begun with other
    settings, and token caches. These are no artifact's input (inputs name the text itself), and
    when they are rebuilt they hold the same ids. Everything else is an input of the student, directly or not:
    teacher, scores and plan by way of pruned, logits where they teach. Rebuilt, it would be
    younger than the student, by the rule of ``condition`` a reason to train again; so it stays.
    ``intermediate`` leaves what a run is for, and its plan; the next run starts from the beginning.
    What no run has made stays always.

    Raises:
        ValueError: no workspace or level, a stage at work, or no whole export of the newest work to
            be left.
    """
    if not is_workspace(workspace):
        raise ValueError(
            f"{workspace}: expected a workspace, found neither an artifact nor {COMMANDS} there"
        )
    if level not in LEVELS:
        raise ValueError(f"{workspace}: expected a level of {', '.join(LEVELS)}, found {level!r}")
    if _held(Workspace(workspace).stage_lock):
        raise ValueError(f"{workspace}: expected nobody at work, found a stage that has yet to end")
    due = [*_leftovers(workspace), *_beside(workspace, TOKENS)]
    own = [workspace / name for name in _OWN if not (workspace / name).is_symlink()]
    begun = [path for folder in own for path in set_aside(folder) if not manifest_in(path).exists()]
    due += [(path, "begun with other settings") for path in begun]
    due += _intermediate(workspace) if level == "intermediate" else []
    paths = {path for path, _ in due}
    return [
        Item(path, _measure(path)[1], why) for path, why in due if paths.isdisjoint(path.parents)
    ]


def _intermediate(workspace: Path) -> Iterator[tuple[Path, str]]:
    """Artifacts, the last one first: a removal cut short leaves a beginning that a run resumes from."""
    folder, export = Workspace(workspace).export, _artifact(workspace, "export")
    refusal = (
        f"{folder}: expected a whole export of the newest work before more than caches goes, found"
    )
    if export and (links := [path for path in (folder, *folder.rglob("*")) if path.is_symlink()]):
        raise ValueError(f"{refusal} a link in its place: {links[0]}")
    if export is None or export.state != "done" or export.finished is None:
        raise ValueError(
            f"{refusal} " + (f"it {export.state}: {export.detail}" if export else "none")
        )
    for name in [name for name in reversed(ARTIFACTS) if name not in KEPT]:
        if (artifact := _artifact(workspace, name)) and os.path.lexists(workspace / name):
            made = (
                artifact.finished.timestamp()
                if artifact.finished
                else _measure(workspace / name)[2]
            )
            if made > export.finished.timestamp():
                raise ValueError(
                    f"{refusal} {workspace / name} to be younger; end that run, or remove this"
                )
            yield workspace / name, "an artifact"
    yield from (*_beside(workspace, LIVE), *_beside(workspace, UNPACKED))


def _beside(workspace: Path, name: str) -> Iterator[tuple[Path, str]]:
    root, (mark, why) = workspace / name, BESIDE[name]
    for path in [root] if root.is_symlink() else sorted(root.glob("*")):
        if path.is_symlink():
            yield path, "a link; what it points at stays"
        elif os.path.exists(path / mark) and not _held(
            build_lock_of(path)
        ):  # shared, being written
            yield path, why


def _leftovers(workspace: Path) -> Iterator[tuple[Path, str]]:
    """What killed builds left: none is at work now, for the caller holds the workspace."""
    places = [path for folder in Workspace(workspace).artifacts for path in leftovers_of(folder)]
    places += [
        path for path in sorted(workspace.glob(".*")) if is_leftover(path.name) and path.is_file()
    ]
    for folder in [workspace / name for name in _OWN if name != TOKENS]:
        try:
            found = condition(folder)
        except _STRANGE:  # nothing says what belongs to it
            continue
        if found.manifest is None and found.state != "absent":
            continue
        if found.state == "done":
            places.append(state_in(folder))  # killed before it was tidied away
        listed = (
            [folder / output.file for output in found.manifest.outputs] if found.manifest else []
        )
        belongs = {part for path in listed for part in (path, *path.parents)}
        for at, folders, files in () if folder.is_symlink() else os.walk(folder):
            inside = [Path(at, name) for name in (*folders, *files) if is_leftover(name)]
            places += [path for path in sorted(inside) if path not in belongs]
    yield from ((path, "left by a killed build") for path in places if os.path.lexists(path))


def remove(items: Sequence[Item]) -> int:
    """Removes what ``rubbish`` found, the caller still holding the lock; returns the bytes freed.

    Raises:
        ValueError: an item lies in no workspace; nothing was removed.
        OSError: the system refuses; what comes before is gone.
    """
    for item in items:
        if not any(is_workspace(parent) for parent in item.path.parents):
            raise ValueError(
                f"{item.path}: expected a part of a workspace, found no workspace around it"
            )
    freed = 0
    for path in [item.path for item in items]:
        freed += _measure(path)[1]
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:  # what a kill leaves of it, the next call takes
            discard(path)
    return freed
