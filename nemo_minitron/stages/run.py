"""The stages by name, and how one is run: as the only one in its workspace, with the ranks of torchrun."""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.workspace.accelerator_lock import ENDING_SECONDS, in_use, turn
from nemo_minitron.workspace.command_log import note_command
from nemo_minitron.workspace.locks import alone, locked

if TYPE_CHECKING:
    from nemo_minitron.config.config import Config
    from nemo_minitron.config.launch_config import LaunchConfig
    from nemo_minitron.stages.result import Result


STAGES = {
    "download": "nemo_minitron.stages.download",
    "pretrain": "nemo_minitron.stages.pretrain",
    "correct": "nemo_minitron.stages.correct",
    "score": "nemo_minitron.stages.score",
    "plan": "nemo_minitron.stages.plan",
    "prune": "nemo_minitron.stages.prune",
    "logits": "nemo_minitron.stages.logits",
    "distill": "nemo_minitron.stages.distill",
    "evaluate": "nemo_minitron.stages.evaluate",
    "export": "nemo_minitron.stages.export",
}
"""Stage name, as on the command line, to its module; imported when it is run."""


SEVERAL = ("pretrain", "correct", "score", "logits", "distill", "evaluate")
"""Stages that share their work where torchrun starts several processes."""


def run_stage(name: str, config: "Config") -> "Result":
    """Runs one stage by its name."""
    result: Result = importlib.import_module(STAGES[name]).run(config)
    return result


def run_alone(
    name: str,
    config: "Config",
    before: Sequence[str] = (),
    told: "Callable[[Result], None]" = lambda result: None,
) -> "Result | None":
    """Runs a stage as the only one in its workspace and on its accelerator, with the ranks of torchrun.

    Args:
        name: the stage.
        config: the whole configuration.
        before: stages that rank 0 brings up to date first.
        told: called with their results.

    Returns:
        What came of it; None on the ranks beside rank 0, which share the work and report nothing.
    """
    if _is_follower():
        if name in SEVERAL:
            _together(name, config)
        return None
    patience = config.launch.grace + ENDING_SECONDS
    with alone(Path(config.workspace), patience), in_use(accelerator_of(config.launch, name), patience):
        for each in before:
            told(run_stage(each, config))
        return _together(name, config) if name in SEVERAL else run_stage(name, config)


def run_by_hand(
    name: str, config: "Config", words: list[str], before: Sequence[str], told: "Callable[[Result], None]"
) -> "Result | None":
    """The same for a stage that no flow has started: what a flow would hold is held here, too.

    Args:
        name: the stage.
        config: the whole configuration.
        words: the command line, to be noted.
        before: as for ``run_alone``.
        told: as for ``run_alone``.
    """
    if _is_follower():
        return run_alone(name, config)
    workspace = Path(config.workspace)
    with locked(workspace), turn(accelerator_of(config.launch, name), name):
        note_command(workspace, words)
        return run_alone(name, config, before, told)


def accelerator_of(launch: "LaunchConfig", stage: str) -> str | None:
    """The accelerator of this machine that a stage holds while it computes; None: none."""
    return launch.accelerator if stage in SEVERAL and launch.kind != "slurm" else None


def _is_follower() -> bool:
    """Whether torchrun started this process beside another, its rank 0, which holds the workspace."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def _together(name: str, config: "Config") -> "Result":
    """Runs a stage with the ranks of torchrun, as far as there are any.

    Each waits until rank 0 has come here too: what it makes first is there then. None leaves before another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run_stage(name, config)
    from nemo_minitron.models.ranks import join, leave

    join("auto").broadcast(None)
    result = run_stage(name, config)
    leave()
    return result
