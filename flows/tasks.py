"""A stage as a Prefect task: tried again where that helps, shown while it runs, published when done."""

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TagsContext, TaskRunContext
from prefect.exceptions import Abort, TerminationSignal
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Crashed, Failed
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import exponential_backoff

from nemo_minitron.config.compose import from_dict
from nemo_minitron.config.config import Config
from nemo_minitron.evaluation.gate import GateError
from nemo_minitron.flows import publish
from nemo_minitron.flows.masked_failures import masked_failures
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import StageError, kind_of
from nemo_minitron.launch.launcher import Call, launch, limit_of
from nemo_minitron.launch.out_of_memory import note_memory, with_smaller_micro_batch
from nemo_minitron.security.masking import masked
from nemo_minitron.stages.result import Result
from nemo_minitron.stages.run import accelerator_of
from nemo_minitron.workspace.accelerator_lock import lock_on


def worth_another_try(_: Any, run: TaskRun, state: State) -> bool:
    """Whether a failed stage may succeed if it is run again."""
    try:
        state.result()
    except TaskRunTimeoutError:
        return False
    except Exception as error:
        return kind_of(error) in failures.AGAIN
    return False


@task(
    task_run_name="{name}",
    retry_condition_fn=worth_another_try,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def stage(name: str, values: dict[str, Any], flow: str | None = None) -> Any:
    """Runs one stage.

    Args:
        name: a stage of the command line, or ``baseline``.
        values: the whole configuration as plain dictionaries.
        flow: recipe of the flow's own configuration; see ``Call``.

    Returns:
        A ``Result``; or, where the stage's process was lost and no try is left, the state Crashed;
        or Cancelled, where the run is suspended.
    """
    with masked_failures(stored=False):
        return _stage(name, values, flow)


def _stage(name: str, values: dict[str, Any], flow: str | None) -> Any:
    workspace = Path(values["workspace"])
    lighter, times = with_smaller_micro_batch(workspace, name, values)
    if name == "baseline":
        lighter = {**lighter, "pretrain": {**lighter["pretrain"], "baseline": True}}
    call = Call(name, from_dict(lighter), lighter, values, flow)
    relay = Relay(name)
    if times:
        relay.say(f"{name}: micro-batch halved {times} times, for memory ran out before")
    started = time.monotonic()
    try:
        with publish.progressing(call):
            result = launch(call, relay.take, _suspended)
    except Exception as error:
        if isinstance(error, GateError):
            with _shown(relay):
                publish.gate(workspace, error)
        return _failed(call, values, error)
    with _shown(relay):
        publish.stage(workspace, name, result, time.monotonic() - started)
    warning = _tracked(call.config, name, result)
    if warning:
        relay.say(warning)
    return result


@contextlib.contextmanager
def _shown(relay: "Relay") -> Iterator[None]:
    """Publishes for display only: without a server it logs a line, and the finished stage stays."""
    try:
        yield
    except Exception as error:
        relay.say(f"not published: {' '.join(str(error).split()) or type(error).__name__}")


def run_stage_task(
    name: str, config: Config, values: dict[str, Any], flow: str | None = None
) -> Result:
    """Runs a stage as a task, with the tries and the time limit that the configuration gives it.

    Args:
        name: a stage of the command line, or ``baseline``.
        config: the whole configuration.
        values: the same as plain dictionaries.
        flow: recipe of the flow's own configuration; see ``Call``.

    Raises:
        StageError: it crashed, or took too long.
        Exception: whatever else the stage raised.
    """
    settings = config.launch
    limit = limit_of(settings, name) if settings.kind == "inline" else None
    own = stage.with_options(
        retries=settings.retries,
        retry_delay_seconds=_delays(settings.retry_seconds, settings.retries) or None,
        retry_jitter_factor=0.5,
        timeout_seconds=limit,
    )
    try:
        # flows have tags, their tasks have none: for each tag Prefect 3.8 asks the server for a
        # slot, over a connection that the server has closed during a long stage, and tries again
        # after two seconds
        with _slot(name, config), TagsContext(current_tags=set()):
            result = own(name, values, flow)
    except TaskRunTimeoutError as error:
        text = f"{name}: over its time limit of {limit:g} s (launch.time_limit); run it again to resume"
        raise StageError(name, failures.SLOW, text) from error
    if isinstance(result, State):
        if result.is_cancelled():
            _suspend_if_asked()
            raise Abort(result.message or "cancelled")  # who has cancelled the run notes that it is
        kind = failures.SLOW if result.name == "TimedOut" else failures.LOST
        raise StageError(name, kind, result.message or f"{name} crashed")
    assert isinstance(result, Result)
    return result


_LONGEST_DELAY = 300.0
"""Seconds between tries: of jobs that go on after their time limit there are many."""


def _delays(first: float, tries: int) -> list[float]:
    """Seconds before each further try: twice as long each time, up to a limit, or as long as the first."""
    longest = max(first, _LONGEST_DELAY)
    return [min(delay, longest) for delay in exponential_backoff(first)(tries)]


def _failed(call: Call, values: dict[str, Any], error: Exception) -> Any:
    """The state after a failed try.

    Raises:
        Exception: the failure; Prefect asks ``worth_another_try`` of it.
    """
    kind, workspace = kind_of(error), Path(call.config.workspace)
    # a training has saved what it did, as it was asked; now the flow ends by it
    if kind == failures.STOPPED and _suspended():
        return Cancelled(
            message=f"{call.name}: the run is suspended; when it is resumed, it continues from here"
        )
    if kind == failures.STOPPED and _cancelling():
        return Cancelled(
            message=f"{call.name}: the run is cancelled; when it is started again, it continues from here"
        )
    if kind in (failures.STOPPED, failures.OVER):
        raise TerminationSignal(15) from error
    if kind == failures.SLOW:
        return Failed(name="TimedOut", message=masked(str(error)))
    if kind == failures.MEMORY:
        if not note_memory(workspace, call.name, values):
            text = (
                f"{call.name}: out of memory, and its micro-batch cannot be made smaller: {error}"
            )
            raise StageError(call.name, failures.FAILED, text) from error
        text = f"{call.name}: out of memory; the next try takes half of the micro-batch"
        _let_go(error)
        raise StageError(call.name, failures.MEMORY, text) from None
    context = TaskRunContext.get()
    assert context is not None
    if kind == failures.LOST and context.task_run.run_count > context.task.retries:
        return Crashed(message=masked(str(error)))
    raise error


def _suspended() -> bool:
    """Whether the flow run is to be suspended, which Prefect itself looks at between tasks only."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run_suspension_request.is_requested()


def _cancelling() -> bool:
    """Whether the flow run is being cancelled; the process's signal alone does not say why it ends."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return False
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        state = client.read_flow_run(context.flow_run.id).state
        return state is not None and state.is_cancelling()
    return False


def _suspend_if_asked() -> None:
    """Ends the flow run if it is to be suspended.

    Raises:
        prefect.exceptions.Pause: it is.
    """
    context = FlowRunContext.get()
    if context is not None:
        context.flow_run_suspension_request.raise_if_requested()


def _let_go(error: Exception) -> None:
    """Frees the frames of a failed try, which hold its tensors."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _slot(name: str, config: Config) -> Iterator[None]:
    """Holds the accelerator while a stage computes; flows on this machine that share it wait for each other.

    A lock of the operating system, not a concurrency limit of Prefect: an accelerator belongs to
    one machine, and a limit's slot is lost for good when the server starts again while it is held
    (Prefect 3.8: leases in memory, slots in the database).
    """
    accelerator = accelerator_of(config.launch, "pretrain" if name == "baseline" else name)
    if accelerator is None:
        yield
        return
    lock = lock_on(accelerator, "flow")
    waited = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=5.0 if waited else 0.0)
        except Timeout:
            _suspend_if_asked()
            if not waited:
                Relay(name).say(f"{name}: waiting for {accelerator}, which another flow holds")
            waited = True
    try:
        yield
    finally:
        lock.release()


class Relay:
    """Passes a process' output on: to the run's log where one is kept, else to the screen.

    Each line of the log is a row in Prefect's database, and a progress bar prints thousands:
    between lines that come fast only the last one is passed on. The stage's own log file has them
    all.
    """

    def __init__(self, name: str) -> None:
        self._logger = get_run_logger()
        self._kept = self._logger.isEnabledFor(logging.INFO)
        self._every = 10.0 if self._kept else 2.0
        self._name, self._last = name, -self._every

    def take(self, line: str) -> None:
        """Takes one line of output."""
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self.say(f"{self._name}| {line}")

    def say(self, text: str) -> None:
        """Logs a line that must not be lost."""
        if self._kept:
            self._logger.info("%s", publish.line(text))
        else:
            publish.log_line(text)


def _tracked(config: Config, name: str, result: Result) -> str | None:
    """Logs a stage to MLflow where that is asked for; returns a warning where it did not work."""
    if config.track.mlflow is None:
        return None
    from nemo_minitron.release.mlflow_tracking import track

    workspace = Path(config.workspace).resolve()
    return track(
        config.track.mlflow, config.track.experiment, workspace.name, result.folder, name, result.facts,
        result.headline, str(workspace),
    )  # fmt: skip
