"""A stage as a Slurm job: submitted, waited for, and found again by a flow that was started again.

The job does not die with the flow: it is the batch system's. Its number lies beside the stage's
other papers, so the next flow on the workspace waits for that job instead of starting a second one.
The job is requeue-safe: every stage resumes from what lies on disk, and SIGTERM two minutes before
the time limit lets a training save.
"""

import contextlib
import re
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_minitron.launch.signs_of_life import SignsOfLife
from nemo_minitron.launch.stage_process import clear
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.typed_json import read_json

HEAD, NUMBER = "$MINITRON_HEAD", "$SLURM_JOB_ID"
"""Words of a command on several nodes: where its processes meet, and the job's number.

The batch script knows them. Jobs with one port and one name would join each other where they share a node.
"""
_TEMPLATE = Path(__file__).with_name("batch_script.sh.j2")
_NUMBER = re.compile(r"\d{1,12}", re.ASCII)
_NAME = re.compile(r"minitron-[a-z_]+-[0-9a-f]{8}")
_GONE_FOR = 30.0
"""Seconds that a job may be unknown to squeue with nothing written by it: accounting lags behind."""


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        name: shown in the queue.
        command: program and arguments, one process per node.
        nodes: how many.
        setup: shell lines before it, such as ``module load cuda``.
        options: further ``#SBATCH`` options, such as ``--partition=batch``.
        log: file for its output.
        seconds: its time limit; None: the partition's.
        silence: seconds at work without output or progress after which it counts as hung; None: never.
        progress: file that says how far it is.
    """

    name: str
    command: Sequence[str]
    nodes: int
    setup: Sequence[str]
    options: Sequence[str]
    log: Path
    seconds: float | None = None
    silence: float | None = None
    progress: Path | None = None


class Hung(Exception):
    """A job at work gives no sign of life; it is cancelled."""


def script(job: Job) -> str:
    """The batch script (batch_script.sh.j2).

    Raises:
        ValueError: the log's path cannot stand in it: a line of its own would be run.
    """
    output = str(job.log).replace("%", "%%")
    if re.search(r'[\x00-\x1f"\\]', output):
        raise ValueError(
            f"workspace {plain(job.log.parent.parent)!r}: a batch script cannot hold its name; choose one "
            "without quotes, backslashes and control characters"
        )
    environment = ImmutableSandboxedEnvironment(
        autoescape=False,  # it is a script: the filter quotes
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["quote"] = shlex.quote
    minutes = None if job.seconds is None else max(1, round(job.seconds / 60))
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(job=job, output=output, minutes=minutes, known=(HEAD, NUMBER))


def run_job(
    job: Job,
    job_file: Path,
    outcome: Path,
    recipe: str,
    on_line: Callable[[str], None],
    poll: float = 15.0,
    flow: str = "",
) -> str:
    """Submits a job, or finds the one that was submitted for the same, and waits for its end.

    If this process is asked to end in an orderly way (a cancelled flow, Ctrl-C), the job is
    cancelled; if it is killed, the job goes on.

    Args:
        job: what to submit.
        job_file: file that remembers the job's number.
        outcome: file that the stage writes at its end.
        recipe: identifies what the job is for.
        on_line: called with each line about what happens.
        poll: seconds between looks at the queue.
        flow: identifies what the flow is for whose stage it is; noted, for the stages before it.

    Returns:
        Its number.

    Raises:
        ValueError: there is no sbatch, or it refuses the job.
        Hung: it was silent for too long.
    """
    number = _number(job_file, recipe)
    if number is None:
        _end(job_file, outcome, on_line, poll)
        clear(outcome)
    try:
        if number is None:
            number = _noted(job, job_file, {"recipe": recipe, "flow": flow}, on_line)
        else:
            on_line(f"Slurm job {number} is this stage's already; waiting for it")
        _wait(number, outcome, on_line, poll, _Watch(job))
    except BaseException:
        _cancel(number, job_file, on_line)  # where there is none yet, _noted has ended what began
        raise
    job_file.unlink(missing_ok=True)
    return number


def _noted(
    job: Job, job_file: Path, what_for: Mapping[str, str], on_line: Callable[[str], None]
) -> str:
    """Submits a job under a name that is written down before, and its number after; returns the number."""
    name = f"{job.name}-{secrets.token_hex(4)}"
    # before it is submitted: whoever is ended while sbatch works, or hears no answer, finds it by
    # name
    write_json(job_file, {"name": name, **what_for})
    try:
        number = _submit(job, name)
        write_json(job_file, {"job": number, "name": name, **what_for})
        on_line(f"Slurm job {number} submitted")
    except ValueError:  # refused
        job_file.unlink(missing_ok=True)
        raise
    except ConnectionError:
        raise
    except BaseException:  # also while the number is written down
        with contextlib.suppress(ConnectionError):  # the file stays, for the next run to ask again
            _cancel(_number(job_file, None), job_file, on_line)
        raise
    return number


def _cancel(number: str | None, job_file: Path, on_line: Callable[[str], None]) -> None:
    """Ends a job, and forgets it once Slurm has heard of that."""
    if number is None:
        return
    _call("scancel", "--signal=TERM", "--full", number)
    code, _, error = _call("scancel", number)
    if code:
        on_line(
            f"Slurm job {number} could not be cancelled ({' '.join(error.split())}); the next run finds it"
        )
    else:
        job_file.unlink(missing_ok=True)


def adopt(
    job_file: Path,
    outcome: Path,
    recipe: str,
    on_line: Callable[[str], None],
    poll: float,
    whose: Literal["recipe", "flow"] = "recipe",
) -> None:
    """Waits for a job that a killed flow has left and nobody else waits for, and then forgets it.

    It is another stage's, or this one's, which is not to run as a job any more. Where it was for other
    settings it is ended.

    Args:
        job_file: file that remembers the job's number.
        outcome: file that its stage writes at its end.
        recipe: identifies what is wanted: of the stage (``recipe``), or of the flow (``flow``).
        on_line: called with each line about what happens.
        poll: seconds between looks at the queue.
        whose: of which of the two.

    Raises:
        ConnectionError: the queue cannot be asked.
    """
    number = _number(job_file, recipe, whose)
    if number is None:
        _end(job_file, outcome, on_line, poll)
        return
    try:
        on_line(f"waiting for Slurm job {number} of an earlier run")
        _wait(number, outcome, on_line, poll)
    except BaseException:  # whoever ends this process in an orderly way ends the job
        _cancel(number, job_file, on_line)
        raise
    job_file.unlink(missing_ok=True)


def _end(job_file: Path, outcome: Path, on_line: Callable[[str], None], poll: float) -> None:
    """Ends the job that the file names, which nobody wants any more."""
    number = _number(job_file, None)
    if number is not None:
        on_line(f"ending Slurm job {number} of an earlier run, which was for other settings")
        _call("scancel", number)
        _wait(number, outcome, on_line, poll)
    job_file.unlink(missing_ok=True)


class _Noted(TypedDict):
    name: str
    recipe: str
    flow: NotRequired[str]


def _number(
    job_file: Path, recipe: str | None, whose: Literal["recipe", "flow"] = "recipe"
) -> str | None:
    """The job that the file names; None where there is none, or it is for another recipe.

    One that they know by its name only gets its number noted: the queue forgets it with its end.

    Raises:
        ConnectionError: Slurm knows whether there is one, and cannot be asked now.
        ValueError: what they name is no job's number, or they are damaged.
    """
    if not job_file.is_file():
        return None
    noted = read_json(job_file, _Noted)  # damaged it may hide a job that is at work
    if recipe not in (None, noted.get(whose)):
        return None
    if "job" in noted:
        if not _NUMBER.fullmatch(
            str(noted["job"])
        ):  # scancel would take it for an option, or for all jobs
            raise ValueError(
                f"{job_file}: expected the number of a job, found {plain(noted['job'], 80)!r}; remove it"
            )
        number = str(noted["job"])
        code, out, _ = _call("squeue", "--noheader", "--format=%j", "--jobs", number)
        known = out.strip() if code == 0 else ""
        return (
            number if known in ("", noted["name"]) else None
        )  # somebody else's, or of another cluster
    if not _NAME.fullmatch(noted["name"]):  # none that was given here
        return None
    code, out, error = _call("squeue", "--noheader", "--format=%i", "--name", noted["name"])
    if code:
        raise ConnectionError(f"squeue: {' '.join(error.split()) or f'exit status {code}'}")
    if not out.strip():
        return None
    number = out.split()[0]
    write_json(job_file, {"job": number, **noted})
    return number


def _submit(job: Job, name: str) -> str:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", f"--job-name={name}"],
            input=script(job),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    except FileNotFoundError as error:
        raise ValueError(
            "launch.kind=slurm: no program 'sbatch' here; start the flow on a login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConnectionError("sbatch: no answer within two minutes") from error
    if done.returncode and re.search(
        "timed out|unable to contact|temporarily", done.stderr, re.IGNORECASE
    ):
        raise ConnectionError(f"sbatch: {' '.join(done.stderr.split())}")
    if done.returncode:
        raise ValueError(
            f"launch.slurm.options: sbatch refused the job: {' '.join(done.stderr.split())}"
        )
    return done.stdout.strip().split(";")[0]


def _state(number: str) -> str:
    """A job's state in the queue (PENDING, RUNNING ...); empty where the queue knows it no more.

    Raises:
        ConnectionError: squeue cannot be asked now.
    """
    code, out, error = _call("squeue", "--noheader", "--format=%T", "--jobs", number)
    if code and "invalid job id" not in error.lower():
        raise ConnectionError(f"squeue: {' '.join(error.split()) or f'exit status {code}'}")
    return out.strip().splitlines()[0].strip() if out.strip() else ""


class _Watch:
    """Whether a job at work gives signs of life: its log or its progress changes."""

    def __init__(self, job: Job) -> None:
        self._limit, self._signs = job.silence, SignsOfLife(job.log, job.progress)
        self._state, self._since = "", time.monotonic()

    def look(self, state: str) -> None:
        """Looks for a sign; what is not at work, such as a job that waits for its turn, needs none.

        Raises:
            Hung: there was none for too long.
        """
        if state != self._state or state != "RUNNING":
            self._state, self._since = state, time.monotonic()
        quiet = time.monotonic() - max(self._since, self._signs.last())
        if self._limit is not None and quiet > self._limit:
            raise Hung(f"silent for {self._limit:g} s (launch.silence), taken for hung")


def _wait(
    number: str,
    outcome: Path,
    on_line: Callable[[str], None],
    poll: float,
    watch: _Watch | None = None,
) -> None:
    before, unknown = "", 0.0
    while True:
        try:
            state = _state(number)
        except (
            ConnectionError
        ) as error:  # a controller that restarts is no reason to give the job up
            on_line(str(error))
            state = before or "UNKNOWN"
        if state != before and state:
            on_line(f"Slurm job {number}: {state}")
        before = state
        if watch is not None:
            watch.look(state)
        if not state:
            unknown += poll
            if outcome.is_file() or unknown >= _GONE_FOR:
                return
        else:
            unknown = 0.0
        time.sleep(poll)


def _call(*command: str) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr
