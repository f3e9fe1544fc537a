"""Runs one stage the way ``launch.kind`` says."""

import contextlib
import difflib
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from nemo_minitron.config.config import Config
from nemo_minitron.config.launch_config import LaunchConfig
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import StageError, exit_words, failure_from_json
from nemo_minitron.launch.job_recipe import (
    BASELINE,
    is_sent,
    is_shared,
    processes_of_node,
    recipe_of,
)
from nemo_minitron.launch.process_group import Ended, Limits, run_process
from nemo_minitron.launch.slurm import HEAD, NUMBER, Hung, Job, adopt, run_job
from nemo_minitron.launch.stage_process import clear, outcomes, result_from
from nemo_minitron.security.masking import remember
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.result import Result
from nemo_minitron.stages.run import STAGES, run_alone
from nemo_minitron.workspace import progress
from nemo_minitron.workspace.layout import Workspace, outcome_of_job
from nemo_minitron.workspace.locks import locked
from nemo_minitron.workspace.typed_json import read_json


@dataclass(frozen=True)
class Call:
    """One stage to be run.

    Attributes:
        name: the stage, or ``baseline``, as which ``pretrain`` trains the from-scratch baseline.
        config: the whole configuration.
        values: the same as plain dictionaries.
        asked: these before its micro-batch was halved; None: it was not.
        flow: recipe (``recipe_of``) of the flow's own configuration, of which a search or a cascade makes
            others for its stages; None: the stage's is the flow's own.
    """

    name: str
    config: Config
    values: dict[str, Any]
    asked: dict[str, Any] | None = None
    flow: str | None = None

    @property
    def recipes(self) -> tuple[str, str]:
        """The stage's and the flow's (``recipe_of``)."""
        own = recipe_of(self.values if self.asked is None else self.asked)
        return own, own if self.flow is None else self.flow

    @property
    def stage(self) -> str:
        """The stage behind the name."""
        return "pretrain" if self.name == "baseline" else self.name

    @property
    def workspace(self) -> Workspace:
        """Where it works."""
        return Workspace(Path(self.config.workspace))

    @property
    def outcome(self) -> Path:
        """File that says what became of it."""
        return self.workspace.outcome(self.name)

    @property
    def slurm(self) -> Path:
        """File with the number of its Slurm job."""
        return self.workspace.slurm(self.name)

    @property
    def log(self) -> Path:
        """File with what its processes printed."""
        return self.workspace.log(self.name)

    @property
    def progress(self) -> Path:
        """File that says how far it is."""
        return self.workspace.progress(self.name)


def launch(
    call: Call, on_line: Callable[[str], None], unwanted: Callable[[], bool] = bool
) -> Result:
    """Runs a stage to its end.

    Args:
        call: which, and how.
        on_line: called, in a thread, with each line that a process of its own prints.
        unwanted: True: a process of its own on this machine is asked to save and end.

    Raises:
        ValueError, GateError: as the stage itself.
        StageError: it failed in a process of its own; ``kind`` says how.
        Exception: whatever it raised in this process.
    """
    remember(call.values)
    call.workspace.launched.mkdir(parents=True, exist_ok=True)
    call.progress.unlink(missing_ok=True)
    _wait_for_jobs(call, on_line)
    if call.config.launch.kind == "inline":
        before = os.environ.get(progress.VARIABLE)
        os.environ[progress.VARIABLE] = str(call.progress.resolve())
        try:
            result = run_alone(call.stage, call.config)
            assert result is not None  # a flow does not run under torchrun
            return result
        finally:
            os.environ.pop(progress.VARIABLE, None)
            if before is not None:
                os.environ[progress.VARIABLE] = before
    return _elsewhere(call, on_line, unwanted)


def _wait_for_jobs(call: Call, on_line: Callable[[str], None]) -> None:
    """Waits for jobs that an earlier flow has left, but for the one that the stage itself will wait for.

    No two stages work in one workspace. Another stage's is not judged by this one's configuration: a
    search and a cascade change theirs between stages, and their own next stage asks for it in full.
    """
    settings = call.config.launch
    for noted in call.workspace.slurm_jobs:
        own, of_flow = call.recipes
        outcome, every = outcome_of_job(noted), settings.slurm.poll_seconds
        if noted != call.slurm:
            adopt(noted, outcome, of_flow, on_line, every, "flow")
        elif settings.kind != "slurm" or not _is_sent(call):
            adopt(noted, outcome, own, on_line, every)


def _elsewhere(call: Call, on_line: Callable[[str], None], unwanted: Callable[[], bool]) -> Result:
    """Runs a stage in other processes."""
    settings = call.config.launch
    values = call.workspace.values(call.name)
    _write_private(values, call.values)
    command = [
        sys.executable,
        "-m",
        "nemo_minitron.launch.stage_process",
        call.stage,
        str(values),
        str(call.outcome),
    ]
    if _is_shared(call) and settings.kind in ("torchrun", "slurm"):
        command = _torchrun(settings, command, call.workspace.launched)
    if _is_sent(call) and settings.kind == "slurm":
        return _queued(call, command, on_line)
    clear(call.outcome)
    limits = Limits(limit_of(settings, call.name), settings.silence, settings.grace)
    environment = {
        **os.environ,
        progress.VARIABLE: str(call.progress.resolve()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a random.py in the working folder is not Python's
    }
    if _is_shared(call) and settings.kind == "torchrun":
        environment[_ENDING] = str(math.ceil(settings.grace))
    ended = run_process(command, environment, call.log, limits, on_line, call.progress, unwanted)
    return _ended(call, ended, limits)


_ENDING = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that torchrun leaves its ranks between SIGTERM and SIGKILL; torch before 2.12 reads nothing, and
leaves them 30."""

_BEFORE_THE_END = 110
"""The same in a batch job, whose SIGTERM comes two minutes before its end (batch_script.sh.j2)."""


def ranks_of(config: Config, name: str) -> int:
    """Processes that share a stage, over all nodes."""
    settings = config.launch
    if settings.kind not in ("torchrun", "slurm") or not is_shared(name, settings.stages):
        return 1
    nodes, processes = _nodes_and_processes(settings)
    return nodes * processes


def _nodes_and_processes(settings: LaunchConfig) -> tuple[int, int]:
    """Nodes, and processes on each."""
    nodes = settings.slurm.nodes if settings.kind == "slurm" else 1
    return nodes, processes_of_node(settings.processes)


def _is_sent(call: Call) -> bool:
    """Whether torchrun and slurm apply to a stage."""
    return is_sent(call.name, call.config.launch.stages)


def _is_shared(call: Call) -> bool:
    """Whether several processes share a stage."""
    return is_shared(call.name, call.config.launch.stages)


def check_names(settings: LaunchConfig) -> None:
    """Refuses names that no stage has, before the first begins.

    Raises:
        ValueError: of which key, and what the stages are called.
    """
    known = [*STAGES, BASELINE]
    for key, names in (
        ("launch.stages", settings.stages or ()),
        ("launch.time_limits", settings.time_limits),
    ):
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; nearest: {near[0]}" if near else ""
                raise ValueError(
                    f"{key}: expected names of stages, {', '.join(known)}, found {plain(name, 40)!r}{hint}"
                )


def _write_private(path: Path, value: Any) -> None:
    """Writes JSON for this user alone: what the stage is handed may hold credentials."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(number, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
    temporary.replace(path)


def _queued(call: Call, command: list[str], on_line: Callable[[str], None]) -> Result:
    """Runs a stage as a Slurm job."""
    settings, slurm, log = call.config.launch, call.config.launch.slurm, call.log.absolute()
    setup = [
        f"cd {shlex.quote(os.getcwd())}",
        "export PYTHONUNBUFFERED=1",  # what it prints is a sign of life
        f"export {progress.VARIABLE}={shlex.quote(str(call.progress.resolve()))}",
        f"export {_ENDING}=${{{_ENDING}:-{_BEFORE_THE_END}}}",
        *slurm.setup,
    ]
    job = Job(
        f"minitron-{call.name}",
        command,
        slurm.nodes if _is_shared(call) else 1,
        setup,
        slurm.options,
        log,
        limit_of(settings, call.name),
        settings.silence,
        call.progress,
    )
    own, of_flow = call.recipes
    try:
        number = run_job(job, call.slurm, call.outcome, own, on_line, slurm.poll_seconds, of_flow)
    except Hung as error:
        text = f"{call.name}: its Slurm job was {error}; {log} has its output"
        raise StageError(call.name, failures.LOST, text) from error
    return _verdict(call, f"Slurm job {number} ended without a word; {log} has its output")


def limit_of(settings: LaunchConfig, name: str) -> float | None:
    """Seconds that a stage may take."""
    own = settings.time_limits.get(name)
    return settings.time_limit if own is None else own


def _torchrun(settings: LaunchConfig, command: list[str], folder: Path) -> list[str]:
    """The command, started once per process and node; torchrun's own files lie in a folder that goes."""
    nodes, processes = _nodes_and_processes(settings)
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={processes}",
        f"--log-dir={folder.absolute()}",
    ]
    if nodes == 1:
        start.append("--standalone")
    else:
        start += ["--rdzv-backend=c10d", "--rdzv-endpoint", HEAD, "--rdzv-id", NUMBER]
    return [*start, *command[1:]]


def _ended(call: Call, ended: Ended, limits: Limits) -> Result:
    """The result of a process that came to its end."""
    if ended.stopped == "time limit":
        raise StageError(
            call.name, failures.SLOW,
            f"{call.name}: over its time limit of {limits.seconds:g} s (launch.time_limit); what was saved "
            "is kept, run it again to resume",
        )  # fmt: skip
    if ended.stopped == "unwanted":
        text = f"{call.name}: stopped as asked; what was saved is kept, run it again to resume"
        raise StageError(call.name, failures.STOPPED, text)
    last = f"; its last line: {ended.last[-1]}" if ended.last else ""
    if ended.stopped == "silence":
        text = (
            f"{call.name}: silent for {limits.silence:g} s (launch.silence), taken for hung{last}"
        )
        raise StageError(call.name, failures.LOST, text)
    # one that ends by itself, and cannot say why (a full disk, a broken installation), was not lost
    single = "torch.distributed.run" not in ended.command
    kind = failures.FAILED if ended.code > 0 and single else failures.LOST
    return _verdict(
        call, f"{call.name}: its process {exit_words(ended.code)}{last} ({call.log})", kind
    )


class _Outcome(TypedDict, total=False):
    result: dict[str, Any]
    failure: dict[str, Any]
    at: float


def _verdict(call: Call, silent: str, kind: str = failures.LOST) -> Result:
    """What a stage says became of it.

    Raises:
        Exception: what it failed by; where it says nothing it was lost, and ``silent`` tells.
    """
    found = [read_json(path, _Outcome) for path in outcomes(call.outcome)]
    for value in found:
        if "result" in value:
            return result_from(value["result"])
    if not found:
        raise StageError(call.name, kind, silent)
    first = min(found, key=lambda value: value["at"])["failure"]
    if first["kind"] == failures.STOPPED:  # not by us: we do not ask afterwards
        first = {**first, "kind": failures.LOST}
    raise failure_from_json(call.name, first)


@contextlib.contextmanager
def hold_workspace(workspace: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds a workspace for a flow; the files through which flow and stages talk go with the block's end.

    Only the number of a batch job that nobody has waited for stays, and the logs.

    Raises:
        ValueError: another run holds it.
    """
    with locked(workspace, wait):
        try:
            yield
        finally:
            if not Workspace(workspace).slurm_jobs:
                shutil.rmtree(Workspace(workspace).launched, ignore_errors=True)
