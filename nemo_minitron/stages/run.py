"""The stages by name, and how one is run: as the only one in its workspace, with the ranks of torchrun."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.stages.recipe import Recipe
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.accelerator_lock import ENDING_SECONDS, hold_accelerator, in_use
from nemo_minitron.workspace.build import make
from nemo_minitron.workspace.command_log import note_command
from nemo_minitron.workspace.condition import condition
from nemo_minitron.workspace.locks import hold_stage, locked
from nemo_minitron.workspace.manifest import fingerprint
from nemo_minitron.workspace.resumable import make_resumable

if TYPE_CHECKING:
    from nemo_minitron.config.config import Config
    from nemo_minitron.config.launch_config import LaunchConfig
    from nemo_minitron.models.ranks import Ranks


STAGES = {
    "download": "nemo_minitron.stages.download",
    "pretrain": "nemo_minitron.stages.pretrain",
    "correct": "nemo_minitron.stages.correct",
    "score": "nemo_minitron.stages.score",
    "measure-layers": "nemo_minitron.stages.measure_layers",
    "screen": "nemo_minitron.stages.screen",
    "sensitivity": "nemo_minitron.stages.sensitivity",
    "plan": "nemo_minitron.stages.plan",
    "prune": "nemo_minitron.stages.prune",
    "logits": "nemo_minitron.stages.logits",
    "distill": "nemo_minitron.stages.distill",
    "evaluate": "nemo_minitron.stages.evaluate",
    "export": "nemo_minitron.stages.export",
}
"""Stage name, as on the command line, to its module; imported when it is run."""


SEVERAL = (
    "pretrain", "correct", "score", "screen", "sensitivity", "logits", "distill", "evaluate",
)  # fmt: skip
"""Stages that share their work where torchrun starts several processes."""
COMPUTING = (*SEVERAL, "measure-layers")
"""Stages that compute on the accelerator: those, and one that times it, alone."""


def run_stage(name: str, config: "Config") -> Result:
    """Runs one stage by its name, by this process alone."""
    from nemo_minitron.models.ranks import Ranks

    return _lead(name, config, Ranks())


def run_alone(
    name: str,
    config: "Config",
    before: Sequence[str] = (),
    on_result: Callable[[Result], None] = lambda result: None,
) -> Result | None:
    """Runs a stage as the only one in its workspace and on its accelerator, with the ranks of torchrun.

    Args:
        name: the stage.
        config: the whole configuration.
        before: stages that rank 0 brings up to date first.
        on_result: called with their results.

    Returns:
        What came of it; None on the ranks beside rank 0, which share the work and report nothing.
    """
    if _is_follower():
        if name in SEVERAL:
            _follow(name, config)
        return None
    patience = config.launch.grace + ENDING_SECONDS
    with (
        hold_stage(Path(config.workspace), patience),
        in_use(accelerator_of(config.launch, name), patience),
    ):
        for each in before:
            on_result(run_stage(each, config))
        if name not in SEVERAL:
            return run_stage(name, config)
        return _lead(name, config, _join(name, config))


def run_by_hand(
    name: str,
    config: "Config",
    words: list[str],
    before: Sequence[str],
    on_result: Callable[[Result], None],
) -> Result | None:
    """The same for a stage that no flow has started: what a flow would hold is held here, too.

    Args:
        name: the stage.
        config: the whole configuration.
        words: the command line, to be noted.
        before: as for ``run_alone``.
        on_result: as for ``run_alone``.
    """
    if _is_follower():
        return run_alone(name, config)
    workspace = Path(config.workspace)
    with locked(workspace), hold_accelerator(accelerator_of(config.launch, name), name):
        note_command(workspace, words)
        return run_alone(name, config, before, on_result)


def accelerator_of(launch: "LaunchConfig", stage: str) -> str | None:
    """The accelerator of this machine that a stage holds while it computes; None: none."""
    return launch.accelerator if stage in COMPUTING and launch.kind != "slurm" else None


def _is_follower() -> bool:
    """Whether torchrun started this process beside another, its rank 0, which holds the workspace.

    Raises:
        ValueError: srun started it beside others, and torchrun did not: one would work, alone.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdigit() and int(tasks) > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun starts {tasks} processes that know nothing of each other; start one on each node, and let "
            "it start the ranks: srun --ntasks-per-node=1 torchrun --nproc-per-node=gpu ... -m nemo_minitron "
            "(docs/scale.md), or launch.kind=slurm"
        )
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def _lead(name: str, config: "Config", ranks: "Ranks") -> Result:
    """Runs a stage on rank 0: it looks, and tells the others once whether something is due, and where."""
    stage = importlib.import_module(STAGES[name])
    if not hasattr(stage, "recipe"):  # never one of SEVERAL
        own: Result = stage.run(config)
        return own
    recipe: Recipe = stage.recipe(config)
    begun = False

    def build(state: Path, target: Path) -> Mapping[str, str] | None:
        nonlocal begun
        begun = True
        ranks.broadcast((state, target))
        return recipe.build(state, target, ranks)

    made = _make(recipe, build)
    if not begun:
        ranks.broadcast(None)
    _leave(ranks)
    return Result(name, recipe.folder, made, **vars(recipe.summary()))


def _follow(name: str, config: "Config") -> None:
    """Runs a stage on another rank: it hears from rank 0 what is due, and does its share."""
    stage, ranks = importlib.import_module(STAGES[name]), _join(name, config)
    due = ranks.broadcast(None)  # what rank 0 makes first is there then
    if due is not None:
        stage.recipe(config).build(*due, ranks)
    _leave(ranks)


def _make(recipe: Recipe, build: Callable[[Path, Path], Mapping[str, str] | None]) -> bool:
    """Makes a recipe's artifact unless it is there; says whether it had to be made."""
    folder, kind, settings, inputs = recipe.folder, recipe.kind, recipe.settings, recipe.inputs
    expected = fingerprint(kind, settings, inputs)
    if condition(folder, expected, inputs).state != "done":
        recipe.check()
    if not recipe.resumable:
        return make(folder, kind, settings, inputs, lambda target: build(target, target))

    def resumed(state: Path, target: Path) -> None:
        build(state, target)

    return make_resumable(folder, kind, settings, inputs, resumed, recipe.keep)


def _join(name: str, config: "Config") -> "Ranks":
    """Meets the other ranks, on the device that the stage computes on."""
    from nemo_minitron.models.ranks import join
    from nemo_minitron.stages.devices import device_of

    return join(device_of(name, config))


def _leave(ranks: "Ranks") -> None:
    """Ends the connection of the ranks in good order: none goes while another still talks."""
    if ranks.several:
        from nemo_minitron.models.ranks import leave

        leave()
