"""The whole pipeline as a Prefect flow: one task per stage.

Only small dictionaries and paths cross tasks. Prefect's own result cache is off: the manifest of
each artifact says whether there is anything to do.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from nemo_minitron.config.compose import as_dict, from_dict
from nemo_minitron.config.config import Config
from nemo_minitron.config.launch_config import LaunchConfig
from nemo_minitron.flows.forms import Launch, Sizes, cli_words, composed
from nemo_minitron.flows.masked_failures import flow
from nemo_minitron.flows.publish import log_line
from nemo_minitron.flows.tasks import run_stage_task
from nemo_minitron.launch.job_recipe import recipe_of
from nemo_minitron.launch.launcher import check_names, hold_workspace
from nemo_minitron.pruning.budget import asks_for_search
from nemo_minitron.security.masking import masked
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.accelerator_lock import ENDING_SECONDS
from nemo_minitron.workspace.command_log import note_command


def steps(config: Config) -> Iterator[str]:
    """Stages of a run, in order."""
    if config.pretrain.enabled:
        yield "pretrain"
    yield "download"
    if config.correct.enabled:
        yield "correct"
    yield from ("score", "plan", "prune")
    if config.distill.teacher_logits == "cache":
        yield "logits"
    yield "distill"
    if config.evaluate.from_scratch:
        yield "baseline"
    yield from ("evaluate", "export")


def run_name() -> str:
    """What Prefect calls a run: the flow, and the workspace's name."""
    given = flow_run.parameters
    config = given.get("config") or {}
    workspace = (
        given.get("workspace") or config.get("workspace") or given.get("config_name") or "run"
    )
    return plain(masked(f"{flow_run.flow_name}-{Path(str(workspace)).name}"))


@flow(name="compress", flow_run_name=run_name)
def compress(
    config_name: str = "config",
    overrides: list[str] | None = None,
    workspace: str | None = None,
    model: str | None = None,
    data: list[str] | None = None,
    plan: Sizes | None = None,  # type: ignore[valid-type]
    launch: Launch | None = None,  # type: ignore[valid-type]
    config: dict[str, Any] | None = None,
    command: str | None = None,
) -> list[Result]:
    """Compresses a model: from ``source.model`` to a Hugging Face folder, every stage an artifact on disk.

    Run again on the same workspace, it resumes, and makes nothing twice.

    Args:
        config_name: configuration to start from, as ``minitron run --config-name``.
        overrides: in Hydra's grammar, as on the command line: plan.hidden=3072,
            trainer.max_steps=500.
        workspace: folder of the run (``workspace``).
        model: hub id or folder of the model to compress (``source.model``).
        data: text to train on: files, folders, patterns, hf://owner/name (``data.train.paths``).
        plan: target sizes.
        launch: where stages run, and what they are allowed.
        config: a whole configuration instead of all of these, as ``minitron run --cfg`` prints it.
        command: the command line behind it, for the report; None: made from the other parameters.

    Returns:
        What each stage reports, in order.
    """
    if config is None:
        checked = composed(config_name, overrides, workspace, model, data, plan, launch)
    else:
        checked = from_dict(config)
    checked.launch.wait = workspace_wait_seconds(checked.launch)
    if checked.cascade.sizes:
        from nemo_minitron.flows.cascade import cascade

        steps_of: list[Result] = cascade(config=as_dict(checked), command=command)
        return steps_of
    if asks_for_search(checked.plan.budget) is not None:
        from nemo_minitron.flows.search import search

        found: list[Result] = search(config=as_dict(checked), command=command)
        return found
    line = [
        "minitron",
        "run",
        *cli_words(config_name, overrides, workspace, model, data, plan, launch),
    ]
    folder = Path(checked.workspace)
    with hold_workspace(folder, checked.launch.wait):
        note_command(folder, shlex.split(command) if command else line)
        results = run_stages(list(steps(checked)), checked)
    return results


def run_stages(names: list[str], config: Config, asked: Config | None = None) -> list[Result]:
    """Runs stages one after the other, and says so on the screen.

    Args:
        names: which.
        config: the whole configuration.
        asked: what the flow was asked for in this workspace, where it made ``config`` of that.

    Returns:
        What each stage reports.
    """
    check_names(config.launch)
    values, results = as_dict(config), []
    flow = recipe_of(values if asked is None else as_dict(asked))
    if config.track.mlflow is not None:
        from nemo_minitron.release.mlflow_tracking import check

        check()  # that it is installed, before hours are spent
    for position, name in enumerate(names):
        place = f"[{position + 1}/{len(names)}] {name}"
        log_line(f"{place} ...")
        result = run_stage_task(name, config, values, flow)
        results.append(result)
        done = "" if result.made else " (already done)"
        log_line(f"{place}: {result.headline}{done}")
    return results


_A_YEAR = 365 * 86400.0


def workspace_wait_seconds(launch: LaunchConfig) -> float:
    """Seconds to wait for a workspace that another run holds.

    A run that is resumed may be under way before the process that it was suspended in has ended,
    and must not be refused by itself: it waits for as long as that may take. A stage inside the
    flow's process, or in a batch job, comes to its end first, whenever that is.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    # Prefect counts a resumed run as one and the same, but it has spent time in the state Running
    # before
    resumed = run is not None and run.total_run_time.total_seconds() > 0
    if not resumed:
        return launch.wait
    if launch.kind in ("inline", "slurm"):
        return _A_YEAR
    return max(launch.wait, launch.grace + ENDING_SECONDS)


if __name__ == "__main__":
    compress.serve(name="compress")
