"""Stages as processes: one, several under torchrun, a Slurm job; crashed, killed, requeued, found again."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.launcher.api import LaunchConfig as LaunchOfTorch

from nemo_minitron.config.compose import as_dict, load_config
from nemo_minitron.config.launch_config import LaunchConfig
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import StageError
from nemo_minitron.launch.launcher import Call, _is_shared, check_names, launch
from nemo_minitron.launch.slurm import HEAD, NUMBER, Hung, Job, adopt, run_job, script
from nemo_minitron.launch.slurm import _submit as slurm_submit
from nemo_minitron.stages.run import accelerator_of
from nemo_minitron.workspace.accelerator_lock import in_use
from nemo_minitron.workspace.manifest import read_manifest
from tests.support import slurm
from tests.support.processes import until
from tests.support.runs import command_line, kill_group, settings, started

FLOW = """
import json, sys
from nemo_minitron.config.compose import from_dict
from nemo_minitron.launch.launcher import Call, launch
values = json.load(open(sys.argv[2]))
launch(Call(sys.argv[1], from_dict(values), values, None, *sys.argv[3:]), print)
"""


ENDING = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


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
        out.file: out.sha256
        for out in read_manifest(folder).outputs
        if not out.file.startswith("metrics.")
    }


def when(condition, act):
    """Does something as soon as a condition holds, from another thread."""

    def watch():
        until(condition, every=0.01)
        act()

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
        if "launch.stage_process" in command_line(child)
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
    assert launch(call("launch.kind=inline"), print).made is False


def test_the_users_mistakes_come_back_as_such(trained, tmp_path, monkeypatch):
    """Also from a working folder with a file that is named like a module of Python's."""
    _, call = trained
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^distill: kl and ce must not be negative, nor both 0, found 0"
    ):
        launch(call("launch.kind=subprocess", "distill.kl=0"), print)
    with pytest.raises(StageError) as failure:
        launch(call("launch.kind=subprocess", "launch.time_limit=1"), print)
    assert failure.value.kind == failures.SLOW and "launch.time_limit" in str(failure.value)


@pytest.mark.slow
def test_several_processes_under_torchrun_and_one_of_them_dies(
    trained, finished, tmp_path, monkeypatch
):
    workspace, call = trained
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    words = ("launch.kind=torchrun", "launch.processes=2", "distill.batch_size=2")

    def kill_the_last():
        ranks = [
            child for child in children() if "torch.distributed.run" not in command_line(child)
        ]
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
        read_manifest(workspace / "student").fingerprint
        == read_manifest(finished[0] / "student").fingerprint
    )
    # torchrun makes a folder of its own in each start, and removes none
    assert not list((tmp_path / "temporary").glob("torchelastic*"))


def test_torchrun_leaves_its_ranks_the_time_that_the_launch_has(trained):
    """And not 30 seconds, whatever is set; torch before 2.12 knows no other number."""
    _, call = trained
    seen = []

    def launchers():
        return [child for child in children() if "torch.distributed.run" in command_line(child)]

    def look():
        (launcher,) = launchers()
        seen.append(launcher.environ().get(ENDING))
        launcher.kill()

    looker = when(launchers, look)
    words = ("launch.kind=torchrun", "launch.processes=1", "launch.grace=44.5")
    with pytest.raises(StageError):
        launch(call(*words), print)
    looker.join()
    assert seen == ["45"]


@pytest.mark.skipif(not hasattr(LaunchOfTorch, "shutdown_timeout"), reason="torch before 2.12")
def test_torchrun_reads_how_much_time_it_leaves(monkeypatch):
    monkeypatch.setenv(ENDING, "45")
    assert LaunchOfTorch(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 45


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


@pytest.mark.slow
def test_a_slurm_job_outlives_its_flow_is_requeued_and_goes_on(trained, queue, tmp_path):
    workspace, call = trained
    long = ("trainer.max_steps=100", "trainer.val_check_interval=100")
    assert launch(call(*long), print).made
    straight = hashes(workspace / "student")
    shutil.rmtree(workspace / "student")
    killed_at_its_job(launched(call(*SLURM, *long), tmp_path / "values.json"), workspace)
    heard: list[str] = []
    requeuer = when(
        lambda: steps(workspace) >= 6, lambda: slurm.main(queue, "scontrol", ["requeue", "1"])
    )
    result = launch(call(*SLURM, *long), heard.append)  # another flow finds the job, and waits
    requeuer.join()
    assert (queue / "jobs" / "1.requeued").exists()  # while it was at work
    log = (workspace / "logs" / "distill.log").read_text()
    assert log.count("distill: process ") == 2 and log.count("distill: 100 steps") == 1
    assert result.headline.startswith("100 steps") and hashes(workspace / "student") == straight
    assert heard[0] == "Slurm job 1 is this stage's already; waiting for it"
    assert "Slurm job 1: RUNNING" in heard
    assert len(list((queue / "jobs").glob("*.sh"))) == 1
    text = (queue / "jobs" / "1.sh").read_text()
    for line in (
        "#SBATCH --requeue",
        "#SBATCH --signal=B:TERM@120",
        "#SBATCH --partition=tiny",
        "#SBATCH --job-name=minitron-distill",
    ):
        assert line in text.splitlines()


class Told(Exception):
    """What a signal raises in a flow."""


@contextlib.contextmanager
def told_to_end(condition):
    """Ends what runs in the block as soon as a condition holds."""

    def tell(*_):
        raise Told

    flow = threading.get_ident()
    before = signal.signal(signal.SIGALRM, tell)
    teller = when(condition, lambda: signal.pthread_kill(flow, signal.SIGALRM))
    try:
        with pytest.raises(Told):
            yield
    finally:
        teller.join()
        signal.signal(signal.SIGALRM, before)


def test_cancelling_ends_the_job_whatever_the_flow_was_about(queue, tmp_path):
    papers, outcome, jobs, heard = (
        tmp_path / "papers.json",
        tmp_path / "outcome",
        queue / "jobs",
        [],
    )
    job = Job("minitron-x", ["sleep", "300"], 1, [], [], tmp_path / "log")

    def run():
        run_job(job, papers, outcome, "recipe", heard.append, 0.1)

    (queue / "slow").touch()  # sbatch has taken the job, and does not answer
    with told_to_end((jobs / "1.pid").exists):
        run()
    assert (jobs / "1.cancelled").exists() and not papers.exists()
    (queue / "slow").unlink()
    (queue / "away").touch()  # Slurm does not hear of it
    with told_to_end((jobs / "2.asked").exists):
        run()
    assert slurm.running(jobs, "2") and papers.exists() and "could not be cancelled" in heard[-1]
    (queue / "away").unlink()
    # the next run waits for it, as for one that a killed flow left; and is cancelled
    with told_to_end(lambda: "waiting for Slurm job 2 of an earlier run" in heard):
        adopt(papers, outcome, "recipe", heard.append, 0.1)
    assert (jobs / "2.cancelled").exists() and not papers.exists()
    papers.write_text(
        json.dumps({"name": "minitron-nobody", "recipe": "recipe"})
    )  # never came to be
    with told_to_end((jobs / "3.asked").exists):
        run()
    assert (jobs / "3.cancelled").exists()

    def told_at_once(line):
        raise Told

    with pytest.raises(Told):  # while it is said that the job is submitted
        run_job(job, papers, outcome, "recipe", told_at_once, 0.1)
    assert (jobs / "4.cancelled").exists() and not papers.exists()


@pytest.mark.parametrize("job", ["--user=root", "1 2", "", "-1", "1;2"])
def test_a_workspaces_papers_end_no_job_but_their_own(queue, tmp_path, job):
    """scancel takes what stands in them for options, or for other jobs."""
    papers, jobs = tmp_path / "papers.json", queue / "jobs"
    papers.write_text(json.dumps({"job": job, "name": "minitron-x", "recipe": "another"}))
    mine = Job("minitron-x", ["true"], 1, [], [], tmp_path / "log")
    for use in (
        lambda: run_job(mine, papers, tmp_path / "outcome", "recipe", print, 0.1),
        lambda: adopt(papers, tmp_path / "outcome", "another", print, 0.1),
    ):
        with pytest.raises(ValueError, match=r"papers\.json: expected the number of a job"):
            use()
    assert not list(jobs.iterdir())


def test_a_job_of_somebody_elses_is_left_alone(queue, tmp_path):
    """By its number, which a queue gives again, or by a name that no job of this package has."""
    jobs, papers, heard = queue / "jobs", tmp_path / "papers.json", []
    theirs = Job("precious", ["sleep", "300"], 1, [], [], tmp_path / "theirs.log")
    number = slurm_submit(theirs, "precious")
    for noted in ({"job": number, "name": "minitron-score-0a0b0c0d"}, {"name": "precious"}):
        papers.write_text(json.dumps({**noted, "recipe": "another"}))
        adopt(papers, tmp_path / "outcome", "recipe", heard.append, 0.1)
        assert slurm.running(jobs, number) and not papers.exists()
        assert not (jobs / f"{number}.cancelled").exists()
    slurm.send(jobs, number, signal.SIGKILL)


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b"])
def test_a_workspaces_name_is_no_line_of_a_batch_script(tmp_path, name):
    job = Job("minitron-x", ["true"], 1, [], [], tmp_path / name / "logs" / "x.log")
    with pytest.raises(ValueError, match="a batch script cannot hold its name"):
        script(job)


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
        lambda: slurm.running(queue / "jobs", "1"),
        lambda: slurm.send(queue / "jobs", "1", signal.SIGKILL),
    )
    with pytest.raises(StageError, match="Slurm job 1 ended without a word") as failure:
        launch(call(*SLURM), print)
    killer.join()
    assert failure.value.kind == failures.LOST
    lines = (queue / "jobs" / "1.sh").read_text().splitlines()
    (time_to_save,) = [line for line in lines if ENDING in line]
    for own, expected in ((None, "110"), ("300", "300")):
        environment = {k: v for k, v in os.environ.items() if k != ENDING}
        environment |= {} if own is None else {ENDING: own}
        command = ["bash", "-c", f"{time_to_save}; printenv {ENDING}"]
        told = subprocess.run(
            command, text=True, check=True, stdout=subprocess.PIPE, env=environment
        )
        assert told.stdout.strip() == expected
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no program 'sbatch' here"):
        launch(call(*SLURM), print)


def test_a_job_on_several_nodes_meets_at_its_first():
    job = Job(
        "minitron-distill",
        ["python", "it's", "$HOME", "--rdzv-endpoint", HEAD, "--rdzv-id", NUMBER],
        16,
        ["module load cuda"],
        [],
        Path("/x.log"),
        7200,
    )
    lines = script(job).splitlines()
    assert "#SBATCH --nodes=16" in lines and "#SBATCH --time=120" in lines
    # only the meeting point is a variable, every other word is what it is
    assert (
        lines[-1]
        == f"""exec srun python {shlex.quote("it's")} '$HOME' --rdzv-endpoint "$MINITRON_HEAD" --rdzv-id "$SLURM_JOB_ID\""""
    )
    assert lines.index("module load cuda") < len(lines) - 1
    (meeting,) = [line for line in lines if line.startswith("export MINITRON_HEAD=")]
    node = "scontrol() { printf 'first\\nsecond\\n'; }"
    places = [
        subprocess.run(
            ["bash", "-c", f"{node}; {meeting}; echo $MINITRON_HEAD"], text=True, check=True,
            stdout=subprocess.PIPE, env={**os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "x"},
        ).stdout
        for number in ("7", "8", "19999999")
    ]  # fmt: skip
    assert places == ["first:20007\n", "first:20008\n", "first:39999\n"]


def test_a_job_at_work_that_is_silent_is_ended_and_one_that_speaks_is_not(queue, tmp_path):
    lines: list[str] = []

    def run(command, silence, name):
        place = tmp_path / name
        place.mkdir()
        job = Job(
            f"minitron-{name}",
            ["bash", "-c", command],
            1,
            [],
            [],
            place / "log",
            None,
            silence,
            place / "progress",
        )
        return run_job(job, place / "job.json", place / "outcome", "recipe", lines.append, 0.05)

    with pytest.raises(Hung, match=r"^silent for 0.6 s \(launch.silence\), taken for hung$"):
        run("echo begun; sleep 300", 0.6, "silent")
    assert not (tmp_path / "silent" / "job.json").exists()  # it was cancelled
    until(lambda: not slurm.running(queue / "jobs", "1"), 30)
    speaks = (
        f"for i in $(seq 14); do sleep 0.4; echo $i; done; echo '{{}}' > {tmp_path}/speaks/outcome"
    )
    assert run(speaks, 4, "speaks") == "2"
    shows = speaks.replace("echo $i", f"date +%N > {tmp_path}/shows/progress").replace(
        "speaks/out", "shows/out"
    )
    assert run(shows, 4, "shows") == "3"


def test_the_baseline_is_launched_as_the_student_whose_tokens_it_sees(trained):
    _, call = trained
    for stages, shared in (
        ("null", {"pretrain", "distill", "baseline"}),
        ("[distill]", {"distill", "baseline"}),
        ("[baseline]", {"baseline"}),
        ("[pretrain,score]", {"pretrain"}),
    ):
        words = ("launch.kind=torchrun", f"launch.stages={stages}")
        found = {
            name
            for name in ("pretrain", "distill", "baseline")
            if _is_shared(call(*words, name=name))
        }
        assert found == shared, stages


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("launch.stages=[score,distil]", "launch.stages"),
        ("+launch.time_limits.distil=60", "launch.time_limits"),
    ],
)
def test_a_name_that_no_stage_has_is_refused(trained, word, key):
    _, call = trained
    with pytest.raises(
        ValueError, match=rf"^{key}: expected names of stages, .*found 'distil'; nearest: distill$"
    ):
        check_names(call(word).config.launch)
    check_names(
        call(
            "launch.stages=[measure-layers,baseline]", "+launch.time_limits.baseline=60"
        ).config.launch
    )


def test_before_its_time_is_up_a_job_saves(trained, queue):
    """SIGTERM goes to the batch shell hold_stage, as sbatch's --signal=B:TERM@120 sends it."""
    workspace, call = trained
    jobs = queue / "jobs"
    words = (*SLURM, "trainer.max_steps=100000",
             "exp_manager.checkpoint_callback_params.every_n_train_steps=100000", "trainer.val_check_interval=50000")  # fmt: skip
    killer = when(
        lambda: steps(workspace) >= 6,
        lambda: os.kill(int((jobs / "1.pid").read_text()), signal.SIGTERM),
    )
    heard: list[str] = []
    with pytest.raises(StageError) as failure:
        launch(call(*words), heard.append)
    killer.join()
    assert failure.value.kind in failures.AGAIN
    assert heard[0] == "Slurm job 1 submitted" and "Slurm job 1: RUNNING" in heard
    saved = [
        int(path.stem.split("=")[1].split("-")[0])
        for path in (workspace / "student" / "state").rglob("step=*.ckpt")
    ]
    assert saved and max(saved) >= 6


def launched(call: Call, values: Path, *flow: str) -> subprocess.Popen[bytes]:
    """A process that runs a stage as a flow does."""
    values.write_text(json.dumps(call.values))
    command = [sys.executable, "-c", FLOW, call.name, str(values), *flow]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until_its_job_is_noted(flow, workspace: Path) -> None:
    """Waits until the number of a flow's job is written down."""
    papers = workspace / ".launch" / "distill.slurm.json"

    def noted() -> bool:
        return papers.is_file() and "job" in json.loads(papers.read_text())

    until(lambda: flow.poll() is not None or noted(), every=0.05)
    assert flow.poll() is None  # it waits for the job


def killed_at_its_job(flow, workspace: Path) -> None:
    """Kills a flow as soon as the number of its job is written down."""
    until_its_job_is_noted(flow, workspace)
    flow.kill()
    flow.wait()


@pytest.mark.slow
def test_a_whole_flow_that_was_killed_waits_for_its_job_and_other_settings_end_it(
    trained, finished, queue, served, tmp_path, teacher, corpus
):
    workspace, call = trained
    jobs, papers = queue / "jobs", workspace / ".launch" / "distill.slurm.json"
    long = [*SLURM, "launch.stages=[distill]", "trainer.max_steps=100000", "trainer.val_check_interval=50000"]  # fmt: skip
    killed_at_its_job(
        started("run", *settings(workspace, teacher, corpus), *long, env=served), workspace
    )
    assert slurm.running(jobs, "1")
    noted = papers.read_text()
    again = launched(call(*SLURM), tmp_path / "values.json")
    # for other settings: the job of the first is ended, not doubled
    until(lambda: again.poll() is not None or (papers.is_file() and papers.read_text() != noted))
    killed_at_its_job(again, workspace)
    assert not slurm.running(jobs, "1") and (jobs / "1.cancelled").exists()
    slurm.send(jobs, "2", signal.SIGSTOP)  # it must not end before it is looked for
    noted = json.loads(papers.read_text())  # as of one killed while sbatch answers
    papers.write_text(json.dumps({name: value for name, value in noted.items() if name != "job"}))
    waker = when(
        lambda: "job" in json.loads(papers.read_text()),
        lambda: slurm.send(jobs, "2", signal.SIGCONT),
    )
    heard: list[str] = []  # how it is started is no other setting
    assert launch(call(*SLURM, "launch.grace=30"), heard.append).made
    waker.join()
    assert any("Slurm job 2" in line for line in heard) and len(list(jobs.glob("*.sh"))) == 2
    assert hashes(workspace / "student") == hashes(finished[0] / "student")


def test_what_cannot_say_why_it_ended_is_not_tried_for_ever(trained, tmp_path, monkeypatch):
    _, call = trained
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "hydra.py").write_text("raise ImportError('no hydra here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(StageError, match="no hydra here") as failure:
        launch(call("launch.kind=subprocess"), print)
    assert failure.value.kind == failures.FAILED


def held(imports: str, lock: str) -> subprocess.Popen[bytes]:
    """A process that holds a lock until its standard input is closed."""
    code = f"import sys; {imports}\nwith {lock}: print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    return holder


@pytest.mark.slow
def test_a_stage_whose_flow_is_gone_keeps_its_accelerator(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    workspace, call = trained
    words = ("launch.kind=subprocess", "launch.accelerator=gpu-0", "launch.time_limit=200")
    holder = held(
        "from nemo_minitron.workspace.accelerator_lock import in_use", "in_use('gpu-0', 0)"
    )
    log, done = call(*words).log, workspace / "student" / "manifest.json"

    def release():
        time.sleep(1)  # in which it would have gone on
        assert not done.exists() and not (workspace / "student" / "state").exists()
        holder.stdin.close()

    waits = when(lambda: log.is_file() and "distill: process" in log.read_text(), release)
    assert launch(call(*words, name="distill"), print).made  # it waited
    waits.join()
    assert holder.stdin.closed
    assert holder.wait(10) == 0
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = pytest.raises(ConnectionError, match="gpu-0: a stage of another flow")
    with in_use("gpu-0", 0), in_use(None, 0), other, in_use("gpu-0", 0):
        pass
    names = [
        accelerator_of(LaunchConfig(accelerator="gpu-0"), name)
        for name in ("distill", "measure-layers", "plan")
    ]
    assert names == ["gpu-0", "gpu-0", None]  # plan computes nothing


def test_layers_are_timed_where_the_model_runs_by_one_process(trained, queue):
    workspace, call = trained
    own = (
        "launch.processes=2",
        "launch.slurm.nodes=2",
        "plan.budget.dtype=float32",
        "plan.budget.context=16",
    )
    heard: list[str] = []
    result = launch(call(*SLURM, *own, name="measure-layers"), heard.append)
    assert result.made and "Slurm job 1: RUNNING" in heard
    text = (queue / "jobs" / "1.sh").read_text()
    assert "#SBATCH --nodes=1" in text.splitlines()
    assert "torch.distributed" not in text and "srun" not in text
    folder = read_manifest(workspace / "layer_times").outputs
    assert [output.file for output in folder] == ["layer_times.json"]
    here = call(*SLURM, *own, "launch.stages=[distill]", name="measure-layers")
    assert launch(here, heard.append).made is False  # by a process of its own, on this machine
    assert len(list((queue / "jobs").glob("*.sh"))) == 1


def test_two_stages_never_work_in_one_workspace(trained):
    from nemo_minitron.workspace.locks import hold_stage

    workspace, call = trained
    imports = "from pathlib import Path; from nemo_minitron.workspace.locks import hold_stage"
    holder = held(imports, f"hold_stage(Path({str(workspace)!r}))")
    with (
        pytest.raises(ValueError, match="a stage of an earlier run is still at work"),
        hold_stage(workspace, 0.2),
    ):
        pass
    threading.Timer(0.5, holder.stdin.close).start()
    assert launch(call(name="plan"), print).made is False  # it waited
    assert holder.stdin.closed and holder.wait(10) == 0


def test_a_stage_that_is_no_job_any_more_waits_for_the_one_it_was(trained, queue, tmp_path):
    workspace, call = trained
    killed_at_its_job(launched(call(*SLURM), tmp_path / "values.json"), workspace)
    heard: list[str] = []
    result = launch(call(), heard.append)
    assert heard[0] == "waiting for Slurm job 1 of an earlier run"
    assert result.made is False and result.headline.startswith("12 steps")  # the job has made it
    assert not (queue / "jobs" / "1.cancelled").exists()
    assert not (workspace / ".launch" / "distill.slurm.json").exists()


def test_a_job_of_other_micro_batches_is_not_taken_for_one_of_as_many_samples_a_step(
    trained, queue, tmp_path
):
    """The student would be another than the settings say, and whoever reads it would not know."""
    workspace, call = trained
    killed_at_its_job(launched(call(*SLURM), tmp_path / "values.json"), workspace)
    fewer = "distill.batch_size=2"
    heard: list[str] = []
    assert launch(call(*SLURM, fewer), heard.append).made
    assert heard[0] == "ending Slurm job 1 of an earlier run, which was for other settings"
    assert launch(call(fewer), print).made is False  # it is what these settings make
    assert launch(call(fewer, "distill.batch_size=1", "trainer.accumulate_grad_batches=2"), print).made is False  # fmt: skip


@pytest.mark.parametrize(("flow", "ends"), [("search", False), ("another", True)])
def test_a_job_that_the_flow_asks_for_later_is_not_judged_by_a_stage_before_it(
    trained, queue, tmp_path, flow, ends
):
    """A search scores by its budget, and distils its winner: the job has the winner's sizes."""
    workspace, call = trained
    killed_at_its_job(launched(call(*SLURM), tmp_path / "values.json", "search"), workspace)
    config = call(*SLURM, "plan.ffn=24", "launch.stages=[distill]").config
    heard: list[str] = []
    launch(Call("download", config, as_dict(config), None, flow), heard.append)
    told = "ending Slurm job 1 of an earlier run, which" if ends else "waiting for Slurm job 1 of"
    assert heard[0].startswith(told)
    assert (queue / "jobs" / "1.cancelled").exists() == ends
    assert not (workspace / ".launch" / "distill.slurm.json").exists()
    if not ends:
        assert launch(call(), print).made is False  # the job came to its end


@pytest.mark.slow
def test_a_search_that_is_started_again_waits_for_its_winners_job(
    queue, served, tmp_path, teacher, corpus
):
    workspace, jobs = tmp_path / "search", queue / "jobs"
    words = [word for word in settings(workspace, teacher, corpus) if not word.startswith("plan.")]
    words += ["plan.budget.params=15000", "plan.budget.tolerance=0.1", "plan.budget.screened=0",
              "plan.budget.candidates=2", "plan.budget.steps=2", *SLURM, "launch.stages=[distill]",
              "evaluate.from_scratch=false", "evaluate.tasks=[]", "evaluate.prompts=0"]  # fmt: skip

    def cancelled():
        return list(jobs.glob("*.cancelled"))

    killed_at_its_job(started("run", *words, env=served), workspace)
    number = json.loads((workspace / ".launch" / "distill.slurm.json").read_text())["job"]
    slurm.send(jobs, number, signal.SIGSTOP)  # it must not end before it is looked for
    (jobs / f"{number}.asked").unlink(missing_ok=True)
    waker = when(
        (jobs / f"{number}.asked").exists, lambda: slurm.send(jobs, number, signal.SIGCONT)
    )
    again, student = started("run", *words, env=served), workspace / "student" / "manifest.json"
    try:
        until(lambda: again.poll() is not None or student.is_file() or cancelled(), 240, 0.05)
        assert again.poll() is None and not cancelled()
    finally:
        kill_group(again)
        waker.join()


def test_ending_a_flow_in_good_order_cancels_its_job(trained, queue, tmp_path):
    workspace, call = trained
    long = ("trainer.max_steps=100000", "trainer.val_check_interval=50000")
    flow = launched(call(*SLURM, *long), tmp_path / "values.json")
    until_its_job_is_noted(flow, workspace)
    flow.send_signal(signal.SIGINT)
    assert flow.wait(30) != 0
    assert (queue / "jobs" / "1.cancelled").exists()
    until(lambda: not slurm.running(queue / "jobs", "1"), every=0.05)
