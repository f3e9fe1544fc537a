"""The whole pipeline as a Prefect flow: one task per stage, retried where the failure was transient.

Only small dictionaries and paths cross tasks. Prefect's own result cache is off: the manifest of each
artifact says whether there is anything to do.
"""

import base64
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff

from nemo_minitron import stages
from nemo_minitron.artifacts.gate import GATE_COLUMNS, GateError
from nemo_minitron.artifacts.report import PAGE, markdown
from nemo_minitron.artifacts.workspace import locked, note_command
from nemo_minitron.compose import as_dict, from_dict, load_config
from nemo_minitron.stages.config import Config
from nemo_minitron.stages.stage import Result

TRANSIENT = (ConnectionError, TimeoutError, InterruptedError, BlockingIOError)
"""Failures worth another try.

The network's and the machine's passing moods. A wrong configuration is not retried.
"""


def is_transient(_: Any, run: TaskRun, state: State) -> bool:
    """Whether a failed stage may succeed if it is run again."""
    try:
        state.result()
    except TRANSIENT:
        return True
    except BaseException:
        return False
    return False


@task(
    task_run_name="{name}",
    retries=4,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def stage(name: str, values: dict[str, Any]) -> Result:
    """Runs one stage.

    Args:
        name: a stage of the command line, or ``baseline``.
        values: the whole configuration as plain dictionaries.
    """
    config = from_dict(values)
    if name == "baseline":
        config.pretrain.baseline = True
    try:
        result = stages.run_stage("pretrain" if name == "baseline" else name, config)
    except GateError as error:
        text = f"**the quality gate failed, nothing is exported**\n\n{markdown(GATE_COLUMNS, error.rows)}"
        create_markdown_artifact(markdown=text, key="minitron-gate", description="why nothing was exported")
        raise
    _publish(name, result)
    return result


def _publish(name: str, result: Result) -> None:
    """Shows a stage's outcome in Prefect: its table, a link to its folder, its pictures."""
    key = f"minitron-{name}"
    create_link_artifact(link=result.folder.resolve().as_uri(), key=key, description=result.headline)
    if result.columns:
        text = f"**{result.headline}**\n\n{markdown(result.columns, result.rows)}"
        create_markdown_artifact(markdown=text, key=f"{key}-table", description=result.headline)
    for picture in sorted((result.folder / "plots").glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        name_of = picture.stem.replace("_", "-").lower()
        create_image_artifact(image_url=f"data:image/png;base64,{data}", key=f"{key}-{name_of}")
    page = result.folder / PAGE
    if page.is_file():
        create_link_artifact(link=page.resolve().as_uri(), key=f"{key}-page", description="report")


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


@flow(name="compress", flow_run_name="compress-{run_name}", log_prints=False, persist_result=False)
def compress(
    config_name: str = "config",
    overrides: list[str] | None = None,
    config: dict[str, Any] | None = None,
    run_name: str = "run",
    command: str | None = None,
) -> list[Result]:
    """Compresses a model: from ``source.model`` to a Hugging Face folder, every stage an artifact on disk.

    Args:
        config_name: configuration to start from, as ``minitron run --config-name``.
        overrides: in Hydra's grammar, as on the command line.
        config: a whole configuration instead, as ``minitron run --cfg`` prints it.
        run_name: shown in Prefect; ``minitron run`` passes the workspace's name.
        command: the command line behind it, for the report; None: made from the other parameters.

    Returns:
        What each stage reports, in order.
    """
    checked = load_config(config_name, overrides or []) if config is None else from_dict(config)
    names = list(steps(checked))
    results = []
    words = (
        shlex.split(command)
        if command
        else ["minitron", "run", "--config-name", config_name, *(overrides or [])]
    )
    with locked(Path(checked.workspace)):
        note_command(Path(checked.workspace), words)
        for position, name in enumerate(names):
            print(f"[{position + 1}/{len(names)}] {name} ...", file=sys.stderr, flush=True)
            result = stage(name, as_dict(checked))
            results.append(result)
            done = _done(result)
            print(
                f"[{position + 1}/{len(names)}] {name}: {result.headline}{done}", file=sys.stderr, flush=True
            )
    return results


def _done(result: Result) -> str:
    return "" if result.made else " (already done)"


if __name__ == "__main__":
    compress.serve(name="compress")
