"""Stages as processes: one, several under torchrun, a Slurm job; crashed, killed, requeued, found again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nemo_minitron.artifacts.manifest import read_manifest
from nemo_minitron.compose import as_dict, load_config
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import StageError
from nemo_minitron.launch.slurm import Job, script
from nemo_minitron.launch.stage import Call, launch
from tests import slurm
from tests.conftest import settings

QUIET = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def trained(finished, tmp_path, teacher, corpus):
    """A copy of a finished run whose student is missing, and the call that makes it."""
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workspace / "student")

    def call(*words: str, name: str = "distill") -> Call:
        config = load_config("config", [*settings(workspace, teacher, corpus), *words])
        return Call(name, config, as_dict(config))

    return workspace, call


def hashes(folder: Path) -> dict[str, str]:
    return {
        out.file: out.sha256 for out in read_manifest(folder).outputs if not out.file.startswith("metrics.")
    }


def when(condition, act):
    """Does something as soon as a condition holds, from another thread."""

    def watch():
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if condition():
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def steps(workspace: Path) -> int:
    path = workspace / "student" / "state" / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "launch.child" in " ".join(child.cmdline())
    ]


def test_a_process_of_its_own_makes_the_same_artifact_and_a_crash_is_its_own(trained, finished):
    workspace, call = trained
    killer = when(lambda: steps(workspace) >= 6, lambda: children()[0].send_signal(signal.SIGKILL))
    with pytest.raises(StageError) as failure:
        launch(call("launch.kind=subprocess"), print)
    killer.join()
    assert failure.value.kind == failures.LOST and "was killed by SIGKILL" in str(failure.value)
    assert read_manifest(workspace / "student") is None and not children()
    result = launch(call("launch.kind=subprocess"), print)
    assert result.made and result.headline.startswith("12 steps")
    assert hashes(workspace / "student") == hashes(finished[0] / "student")
    log = (workspace / "logs" / "distill.log").read_text()
    assert log.count("distill: process ") == 2 and log.count("distill: 12 steps") == 1
    assert launch(call("launch.kind=subprocess"), print).made is False


def test_the_users_mistakes_come_back_as_such(trained):
    _, call = trained
    with pytest.raises(ValueError, match=r"^distill: kl and ce must not be negative, nor both 0, found -1"):
        launch(call("launch.kind=subprocess", "distill.kl=-1"), print)
    with pytest.raises(StageError) as failure:
        launch(call("launch.kind=subprocess", "launch.time_limit=1"), print)
    assert failure.value.kind == failures.SLOW and "launch.time_limit" in str(failure.value)


def test_several_processes_under_torchrun_and_one_of_them_dies(trained, finished):
    workspace, call = trained
    words = ("launch.kind=torchrun", "launch.processes=2", "distill.batch_size=2")

    def kill_the_last():
        ranks = [child for child in children() if "torch.distributed.run" not in " ".join(child.cmdline())]
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGKILL)

    killer = when(lambda: steps(workspace) >= 5, kill_the_last)
    with pytest.raises(StageError) as failure:
        launch(call(*words), print)
    killer.join()
    assert failure.value.kind in failures.AGAIN, failure.value
    assert not children()
    result = launch(call(*words), print)
    assert result.made
    assert (
        read_manifest(workspace / "student").fingerprint == read_manifest(finished[0] / "student").fingerprint
    )


@pytest.fixture
def queue(tmp_path, monkeypatch):
    folder = slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield folder
    for script_ in (folder / "jobs").glob("*.sh"):
        slurm.send(folder / "jobs", script_.stem, signal.SIGKILL)


SLURM = (
    "launch.kind=slurm",
    "launch.processes=1",
    "launch.slurm.poll_seconds=0.2",
    "launch.slurm.options=['--partition=tiny']",
)


def test_a_slurm_job_that_is_requeued_goes_on_and_its_flow_waits(trained, finished, queue):
    workspace, call = trained
    heard: list[str] = []
    requeuer = when(
        lambda: steps(workspace) >= 6, lambda: subprocess.run(["scontrol", "requeue", "1"], check=True)
    )
    result = launch(call(*SLURM), heard.append)
    requeuer.join()
    assert result.made and hashes(workspace / "student") == hashes(finished[0] / "student")
    assert heard[0] == "Slurm job 1 submitted" and "Slurm job 1: RUNNING" in heard
    assert len(list((queue / "jobs").glob("*.sh"))) == 1
    text = (queue / "jobs" / "1.sh").read_text()
    for line in (
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --partition=tiny",
        "#SBATCH --job-name=minitron-distill",
    ):
        assert line in text.splitlines()


def test_a_flow_that_was_killed_finds_its_job_again(trained, queue, tmp_path):
    _workspace, call = trained
    values = tmp_path / "values.json"
    values.write_text(json.dumps(call(*SLURM).values))
    code = """
import json, sys
from nemo_minitron.compose import from_dict
from nemo_minitron.launch.stage import Call, launch
values = json.load(open(sys.argv[1]))
launch(Call("distill", from_dict(values), values), print)
"""
    flow = subprocess.Popen([sys.executable, "-c", code, str(values)], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (queue / "jobs" / "1.pid").is_file():
        assert time.monotonic() < end and flow.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # its number has been written down
    flow.kill()
    flow.wait()
    heard: list[str] = []
    assert launch(call(*SLURM), heard.append).made
    assert heard[0] == "Slurm job 1 is this stage's already; waiting for it"
    assert len(list((queue / "jobs").glob("*.sh"))) == 1


def test_a_job_that_is_refused_or_vanishes(trained, queue, monkeypatch):
    _workspace, call = trained
    (queue / "refuse").touch()
    with pytest.raises(
        ValueError, match=r"launch.slurm.options: sbatch refused the job: .*Invalid partition"
    ):
        launch(call(*SLURM), print)
    (queue / "refuse").unlink()
    monkeypatch.setattr("nemo_minitron.launch.slurm._GONE_FOR", 1.0)
    killer = when(
        lambda: slurm.running(queue / "jobs", "1"), lambda: slurm.send(queue / "jobs", "1", signal.SIGKILL)
    )
    with pytest.raises(StageError, match="Slurm job 1 ended without a word") as failure:
        launch(call(*SLURM), print)
    killer.join()
    assert failure.value.kind == failures.LOST
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no program 'sbatch' here"):
        launch(call(*SLURM), print)


def test_a_job_on_several_nodes_meets_at_its_first():
    job = Job(
        "minitron-distill",
        ["python", "-m", "x", "--rdzv-endpoint", "$MINITRON_HEAD:29500"],
        16,
        ["module load cuda"],
        [],
        Path("/x.log"),
        7200,
    )
    lines = script(job).splitlines()
    assert "#SBATCH --nodes=16" in lines and "#SBATCH --time=120" in lines
    assert lines[-1] == 'exec srun python -m x --rdzv-endpoint "$MINITRON_HEAD:29500"'
    assert lines.index("module load cuda") < len(lines) - 1
