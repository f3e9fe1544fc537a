"""The same stage with less memory: smaller micro-batches, more of them.

What an artifact is made from does not change with it: a training's recipe names the samples of a
step, not how many are read at once, and what is scored or measured adds up over any batches.
"""

import json
import sys
from pathlib import Path
from typing import Any

from nemo_minitron.config.batch_limit import KEY
from nemo_minitron.config.score_config import USUAL_BATCH
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.layout import MEMORY, Workspace
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.typed_json import read_json

FILE = MEMORY
"""In the workspace: stage to how often its micro-batch was halved."""

_BATCHES = {
    "pretrain": "pretrain", "baseline": "distill", "correct": "correct", "distill": "distill",
    "score": "score", "logits": "distill.cache", "evaluate": "evaluate", "screen": "evaluate",
    "sensitivity": "evaluate",
}  # fmt: skip
"""Stage to the section whose ``batch_size`` is the micro-batch."""
_TRAININGS = ("pretrain", "baseline", "correct", "distill")
_OWN_TRAINER = ("pretrain", "correct")
"""Trainings with a section ``trainer`` of their own, which replaces keys of the common one."""


def with_halved_micro_batch(
    stage: str, values: dict[str, Any], times: int = 1
) -> dict[str, Any] | None:
    """A configuration whose micro-batch is halved so many times, with as many samples a step as before.

    Args:
        stage: which stage, or ``baseline``.
        values: the whole configuration as plain dictionaries; not changed.
        times: how often.

    Returns:
        The configuration, or None where the micro-batch cannot be made smaller without another
        result.
    """
    if stage not in _BATCHES:
        return None
    lighter: dict[str, Any] = json.loads(json.dumps(values))
    section = lighter
    for part in _BATCHES[stage].split("."):
        section = section[part]
    own = lighter[stage]["trainer"] if stage in _OWN_TRAINER else {}
    if stage in _TRAININGS and _is_counted(lighter, own):
        return None
    for _ in range(times):
        # of a card's memory, auto has halved itself already; what is left to try is less than usual
        size = USUAL_BATCH if section["batch_size"] == "auto" else section["batch_size"]
        if size < 2 or (stage in _TRAININGS and size % 2):
            return None
        section["batch_size"] = size // 2
        if stage in _TRAININGS:
            _twice_as_many(lighter["trainer"], own)
    return lighter


def _is_counted(values: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the recipe counts micro-batches: of an epoch, or of a validation that decides."""
    decides = values["training"]["keep"] != "last" or bool(
        values["exp_manager"].get("create_early_stopping_callback")
    )
    for key in (KEY, *(["limit_val_batches"] if decides else [])):
        limit = own.get(key) if own.get(key) is not None else values["trainer"].get(key)
        if limit and (isinstance(limit, int) or limit > 1):  # a share is one of whatever batches
            return True
    return False


def _twice_as_many(common: dict[str, Any], own: dict[str, Any]) -> None:
    """Doubles what a trainer counts in micro-batches, where it stands."""
    counted = (
        ("accumulate_grad_batches", 1),
        ("val_check_interval", None),
        ("limit_val_batches", None),
    )
    for name, default in counted:
        place = own if own.get(name) is not None else common
        count = place.get(name) if place.get(name) is not None else default
        if isinstance(count, int):
            place[name] = 2 * count


def with_smaller_micro_batch(
    workspace: Path, stage: str, values: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """The configuration for the next try, and how often its micro-batch is halved."""
    times = _noted(workspace).get(stage, 0)
    lighter = with_halved_micro_batch(stage, values, times) if times else values
    return (values, 0) if lighter is None else (lighter, times)


def note_memory(workspace: Path, stage: str, values: dict[str, Any]) -> bool:
    """Notes that a stage ran out of memory; returns whether there is a smaller micro-batch to try."""
    noted = _noted(workspace)
    times = noted.get(stage, 0) + 1
    if with_halved_micro_batch(stage, values, times) is None:
        return False
    write_json(Workspace(workspace).memory, {**noted, stage: times})
    return True


def _noted(workspace: Path) -> dict[str, int]:
    path = Workspace(workspace).memory
    try:
        found: dict[str, int] = read_json(path, dict[str, int])
    except OSError:
        return {}
    except ValueError as error:  # the next want of memory is noted again
        print(f"note: {plain(error)}", file=sys.stderr)
        return {}
    return found
