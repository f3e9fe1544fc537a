"""A distillation that was stopped early lends its state to a longer one of the same recipe.

What goes on is, to the bit on a CPU, the training that was never stopped: the state is that of a killed
one. So where it comes from decides nothing, and is no part of a fingerprint.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.config import Config
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.artifacts import check_bytes
from nemo_minitron.workspace.layout import checkpoints_in, metrics_in
from nemo_minitron.workspace.manifest import Input, read_manifest

CARRIED = "carried"
"""Folder of a student that was stopped early: the checkpoint that a longer training resumes from."""
STOP, FROM = "stop_after", "go_on_from"
"""Keys of ``distill``."""


def given(section: Mapping[str, Any], key: str) -> Any:
    """What a stage's section says of one of these keys; None: nothing, as all but that of ``distill``."""
    return section[key] if key in section else None


def whole_only(config: Config) -> dict[str, str]:
    """What only a training in one piece can do, because it looks back on all validations.

    A part hands none of its weights on, and behind its stop there is a validation too many.

    Returns:
        What the configuration asks for of it, to what does without.
    """
    keep, stopping = config.training.keep, "exp_manager.create_early_stopping_callback"
    asked = {}
    if keep != "last":
        asked[f"training.keep={keep}"] = "training.keep=last"
    if config.exp_manager.get("create_early_stopping_callback"):
        asked[f"{stopping}=true"] = f"{stopping}=false"
    return asked


def check_parts(config: Config, section: Mapping[str, Any]) -> None:
    """Refuses a training in parts that only one in one piece could do.

    Raises:
        ValueError: it is asked for.
    """
    parts = [key for key in (FROM, STOP) if given(section, key) is not None]
    for key, instead in whole_only(config).items() if parts else ():
        raise ValueError(
            f"distill.{parts[0]}: not with {key}, which looks back on all validations of a training, and "
            f"a part of one has others; use {instead}, or train in one piece"
        )


def check_stop(section: Mapping[str, Any], steps: int) -> None:
    """Refuses to stop a training where it ends anyway, or later.

    Raises:
        ValueError: it would be.
    """
    stop = given(section, STOP)
    if stop is not None and stop >= steps:
        raise ValueError(
            f"distill.{STOP}: expected fewer steps than the training's {steps}, found {stop}"
        )


def keep_state(state: Path, target: Path) -> None:
    """Puts the newest checkpoint of a training into the artifact that it makes."""
    from nemo_minitron.plugin.experiment import newest_checkpoint

    newest = newest_checkpoint(checkpoints_in(state))
    assert newest is not None, "a training that is stopped has saved before"
    (target / CARRIED).mkdir()
    _copy(newest, target / CARRIED / newest.name)


def take_over(
    student: str | None,
    decides: Mapping[str, Any],
    inputs: Sequence[Input],
    state: Path,
    notes: Sequence[str],
) -> None:
    """Puts the state of a stopped training where a longer one resumes, unless that has begun already.

    Args:
        student: folder of the stopped one; None: nobody named any.
        decides: what decides the longer one.
        inputs: what it is made from.
        state: its state.
        notes: names of files beside the log that go along.

    Raises:
        ValueError: a file of it is not what it was.
    """
    from nemo_minitron.plugin.experiment import newest_checkpoint

    if student is None or newest_checkpoint(checkpoints_in(state)) is not None:
        return
    folder = Path(student).expanduser()
    why = _differs(folder, decides, inputs)
    if why is not None:
        note = f"note: {plain(folder)}: {why}; the distillation starts over"
        print(note, file=sys.stderr, flush=True)
        return
    check_bytes(folder)
    for name in (metrics_in(folder).name, *notes):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, state / name)
    (checkpoint,) = (folder / CARRIED).iterdir()
    checkpoints_in(state).mkdir(parents=True, exist_ok=True)
    _copy(checkpoint, checkpoints_in(state) / checkpoint.name)


def _differs(student: Path, decides: Mapping[str, Any], inputs: Sequence[Input]) -> str | None:
    """Why a training is not the beginning of another one; None: it is."""
    manifest = read_manifest(student)
    if manifest is None or not (student / CARRIED).is_dir():
        return "no distillation that was stopped early"
    own, other = (json.loads(json.dumps(each)) for each in (decides, manifest.config))
    stop, until = other.pop(STOP, None), own.pop(STOP, None)
    changed = sorted(name for name in {*own, *other} if own.get(name) != other.get(name))
    if changed:
        return f"distilled with other settings ({', '.join(changed[:3])})"
    if [i.fingerprint for i in inputs] != [i.fingerprint for i in manifest.inputs]:
        return "distilled from other inputs"
    if stop is None or (until is not None and until < stop):
        return f"distilled for more steps ({stop}) than this one ({until})"
    return None


def _copy(source: Path, target: Path) -> None:
    """A checkpoint is a file, or a folder where weights are in parts; what is cut short has another name."""
    temporary = target.with_name(f".{target.name}.partial")
    if source.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
    else:
        shutil.copyfile(source, temporary)
    temporary.rename(target)
