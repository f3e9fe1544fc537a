"""The command line, run and refused."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from nemo_minitron.cli.main import main
from tests.support.forks import Fork, fits


def started(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Fork | subprocess.Popen[str]:
    """The command line at work in a process of its own, which leads a process group.

    It is forked from one that has imported all there is, unless its environment asks for another import.
    """
    environment = {**os.environ, **(env or {})}
    if fits(environment):
        return Fork(list(arguments), environment, cwd)
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron", *arguments], cwd=cwd, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def kill_group(process: Fork | subprocess.Popen[str]) -> None:
    """Ends a process and those that it started, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def minitron(
    *arguments: str, cwd: Path | None = None, timeout: int = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    process = started(*arguments, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)


def command_line(process: psutil.Process) -> str:
    """What a process runs; nothing where it has ended or waits to be reaped."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


scored: list[Path] = []
"""A workspace with the scores of the teacher that most tests cut: a second of pictures that they need not draw."""


def prune(place: Path, *words: str) -> None:
    """Cuts the teacher in a workspace, with the command line in this process; its scores are there already.

    They are rebuilt where the words ask for others.
    """
    if scored and not place.exists():
        shutil.copytree(scored[-1], place)
    assert main(["prune", f"workspace={place}", *words]) == 0


def settings(workspace: Path, teacher: Path, corpus: Path) -> list[str]:
    """Overrides of a whole run that takes seconds."""
    return [
        f"workspace={workspace}", f"source.model={teacher}", f"data.train.paths=['{corpus}']", "data.holdout=0.2",
        "data.train.sequence_length=16", "data.calibration.sequence_length=16", "data.calibration.samples=20",
        "data.validation.sequence_length=16", "data.validation.samples=16", "plan.hidden=12", "plan.heads=3",
        "plan.ffn=20", "plan.layers=2", "trainer.max_steps=12", "trainer.val_check_interval=4",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=4", "optim.lr=0.005", "optim.sched.warmup_steps=2",
        "distill.batch_size=4", "evaluate.from_scratch=true", "evaluate.tasks=[held_out_choice,held_out_bytes]",
        "evaluate.speed=false", "evaluate.task_limit=20",
    ]  # fmt: skip


def ended(command, seconds=120):
    """Runs a command in a process group of its own, and ends all of it after a while."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def refused(capsys, *arguments):
    """Runs a command that must be refused and returns its one line."""
    code = main(list(arguments))
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith(f"minitron {arguments[0]}: ")
    return err
