"""Deployments for real: a server with SQLite, a worker, schedules that fire, cancelling, kills."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest

from nemo_minitron.cli.main import main
from nemo_minitron.workspace.locks import locked
from nemo_minitron.workspace.manifest import read_manifest
from tests.support.left_behind import end
from tests.support.processes import running, until
from tests.support.runs import command_line, minitron, settings

ROOT = Path(__file__).parents[2]


def ask(environment, what):
    """Asks the server."""
    import httpx
    from prefect.client.orchestration import PrefectClient

    async def go():
        async with PrefectClient(
            environment["PREFECT_API_URL"], httpx_settings={"timeout": httpx.Timeout(30)}
        ) as client:
            return await what(client)

    return asyncio.run(go())


def runs_of(environment, deployment_id, state=None):
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    async def read(client):
        return await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id]))
        )

    found = ask(environment, read)
    return [
        run
        for run in found
        if run.state is not None and (state is None or run.state.type.value == state)
    ]


def named(environment, name):
    return ask(environment, lambda client: client.read_deployment_by_name(name))


def started_by_hand(environment, name, parameters):
    deployment = named(environment, name)
    return ask(
        environment,
        lambda client: client.create_flow_run_from_deployment(deployment.id, parameters=parameters),
    )


def state_of(environment, run):
    return ask(environment, lambda client: client.read_flow_run(run.id)).state


def test_every_deployment_of_the_file_validates_and_keeps_its_schedule(real_server):
    from prefect.client.schemas.actions import WorkPoolCreate

    async def make_pools(client):
        known = {
            kind: entry
            for entries in (await client.read_worker_metadata()).values()
            for kind, entry in entries.items()
        }
        for pool, kind in (
            ("minitron", "process"),
            ("minitron-docker", "docker"),
            ("minitron-kubernetes", "kubernetes"),
        ):
            form = known[kind]["default_base_job_configuration"]
            made = WorkPoolCreate(name=pool, type=kind, base_job_template=form)
            await client.create_work_pool(made, overwrite=True)

    ask(real_server, make_pools)
    words = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        words, env=real_server, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    nightly = named(real_server, "evaluate_checkpoint/nightly")
    (schedule,) = nightly.schedules
    assert schedule.schedule.cron == "0 2 * * *" and nightly.tags == ["nemo_minitron"]
    docker = named(real_server, "compress/compress-docker")
    assert (
        docker.work_pool_name == "minitron-docker"
        and docker.job_variables["image"] == "nemo_minitron:latest"
    )
    with pytest.raises(
        Exception, match="launch"
    ):  # the server itself refuses a form filled in wrongly
        started_by_hand(real_server, "compress/compress", {"launch": {"kind": "rocket"}})


def test_a_scheduled_run_fires_with_its_parameters_and_its_artifacts_are_there(
    real_server, worker, finished, tmp_path, teacher, corpus
):
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.schedules import IntervalSchedule

    workspace = shutil.copytree(finished[0], tmp_path / "nightly")
    words = [
        word for word in settings(workspace, teacher, corpus) if not word.startswith("workspace=")
    ]
    done = minitron(
        "deploy", "every-minute", "--cron", "* * * * *", "--parameter", f"workspace={workspace}",
        *words, env=real_server,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compress/every-minute is deployed" in done.stdout
    deployment = named(real_server, "compress/every-minute")
    (schedule,) = deployment.schedules
    assert schedule.schedule.cron == "* * * * *"
    assert (
        deployment.job_variables["working_dir"] == os.getcwd()
    )  # else: a temporary folder, removed with all in it

    def soon():  # the next minute is far away; an anchor that is past by now would mean the next hour
        anchor = datetime.now(timezone.utc) + timedelta(seconds=10)
        return IntervalSchedule(interval=timedelta(hours=1), anchor_date=anchor)

    ask(
        real_server,
        lambda client: client.update_deployment_schedule(
            deployment.id, schedule.id, schedule=soon()
        ),
    )
    run = until(lambda: runs_of(real_server, deployment.id, "COMPLETED"), 240, 1)[0]
    ask(real_server, lambda client: client.delete_deployment(deployment.id))
    assert run.auto_scheduled and run.parameters["workspace"] == str(workspace)
    assert run.name == "compress-nightly" and "nemo_minitron" in run.tags

    mine = ArtifactFilter(key=ArtifactFilterKey(like_="minitron-nightly-%"))
    listed = ask(real_server, lambda client: client.read_artifacts(artifact_filter=mine))
    found = {artifact.key: artifact for artifact in listed}
    assert "distilled" in json.loads(found["minitron-nightly-evaluate-table"].data)[0]
    assert str(found["minitron-nightly-lineage"].flow_run_id) == str(run.id)


@pytest.fixture
def kind():
    """Where stages run."""
    return "subprocess"


@pytest.fixture
def begun(kind, real_server, worker, finished, tmp_path, teacher, corpus):
    """A run under the worker that will train until it is ended."""
    from prefect.states import Cancelled

    workspace = shutil.copytree(finished[0], tmp_path / "long")
    shutil.rmtree(workspace / "student")
    made = minitron(
        "deploy", "long", "--parameter", f'launch={{"kind": "{kind}"}}', env=real_server
    )
    assert made.returncode == 0, made.stderr
    words = [*settings(workspace, teacher, corpus), "trainer.max_steps=100000", "trainer.val_check_interval=50000",
             "exp_manager.checkpoint_callback_params.every_n_train_steps=50"]  # fmt: skip
    run = started_by_hand(real_server, "compress/long", {"overrides": words})
    try:
        yield workspace, run
    finally:
        over = Cancelled(message="the test has ended")  # nobody starts it again
        ask(real_server, lambda client: client.set_flow_run_state(run.id, over, force=True))
        end(psutil.Process(worker.pid).children(recursive=True), 0)


@pytest.fixture
def long(real_server, worker, begun):
    """The same, at work."""
    workspace, run = begun
    until(lambda: len(logged(workspace)) > 60 or state_of(real_server, run).is_final(), every=0.5)
    assert not state_of(real_server, run).is_final(), worker.log.read_text()[-3000:]
    return workspace, run


def processes(word):
    return [
        p for p in psutil.process_iter(["cmdline"]) if word in " ".join(p.info["cmdline"] or [])
    ]


def logged(workspace):
    log = workspace / "student" / "state" / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def saved(workspace):
    return max(
        int(path.stem.split("=")[1])
        for path in (workspace / "student" / "state").rglob("step=*.ckpt")
    )


def flows_of(worker):
    """The processes of flows under a worker."""
    return [p for p in psutil.Process(worker.pid).children() if "prefect" in command_line(p)]


def until_it_ends_or(condition, environment, run, seconds):
    """Waits for a condition for as long as a run is at work; whether it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        assert not state_of(environment, run).is_final(), state_of(environment, run)
        time.sleep(0.2)
    return False


def cancelled(real_server, workspace, run):
    """Cancels a run that trains: it saves, ends within seconds, and has not crashed."""
    from prefect.states import Cancelling

    before = saved(workspace)
    ask(real_server, lambda client: client.set_flow_run_state(run.id, Cancelling()))
    until(lambda: not processes(str(workspace)), 40)
    until(lambda: state_of(real_server, run).is_final(), 30, every=0.5)
    assert state_of(real_server, run).is_cancelled()
    states = ask(real_server, lambda client: client.read_flow_run_states(run.id))
    assert not any(state.is_crashed() for state in states), states  # which would wake somebody up
    # nothing is lost
    assert saved(workspace) > before and saved(workspace) >= logged(workspace)[-1]["step"]
    assert read_manifest(workspace / "student") is None


@pytest.mark.parametrize("kind", ["inline"])
def test_cancelling_saves_and_ends_the_training_within_seconds(real_server, long):
    workspace, run = long
    assert not processes(str(workspace))
    cancelled(real_server, workspace, run)


@pytest.mark.slow
def test_a_suspended_run_frees_the_machine_and_goes_on_when_resumed_until_it_is_cancelled(
    real_server, worker, long
):
    from prefect.states import Suspended

    workspace, run = long
    assert processes(str(workspace))
    ask(
        real_server,
        lambda client: client.set_flow_run_state(run.id, Suspended(timeout_seconds=600)),
    )
    until(lambda: not processes(str(workspace)), 60)
    until(lambda: not flows_of(worker), 60)  # its process too
    state = state_of(real_server, run)
    assert state.is_paused() and state.name == "Suspended"
    kept = saved(workspace)
    assert kept >= logged(workspace)[-1]["step"] and read_manifest(workspace / "student") is None
    # as if the process that it was suspended in took its time to end
    with locked(workspace, 60):
        ask(real_server, lambda client: client.resume_flow_run(run.id))
        until(lambda: flows_of(worker))
        until(lambda: state_of(real_server, run).is_running(), every=0.5)
        assert not until_it_ends_or(lambda: False, real_server, run, 3)  # it waits
    assert until_it_ends_or(
        lambda: any(row["step"] > kept + 20 for row in logged(workspace)), real_server, run, 240
    ), worker.log.read_text()[-3000:]
    steps = [row["step"] for row in logged(workspace)]
    assert steps == list(range(1, len(steps) + 1))  # and not from its beginning
    cancelled(real_server, workspace, run)


def test_a_flow_that_is_killed_is_crashed_and_takes_its_stage_along(real_server, worker, begun):
    workspace, run = begun
    until(lambda: processes(str(workspace)) or state_of(real_server, run).is_final(), every=0.5)
    (flow,) = flows_of(worker)
    flow.send_signal(signal.SIGKILL)
    until(lambda: state_of(real_server, run).is_final(), 60, every=0.5)
    assert state_of(real_server, run).is_crashed()
    until(lambda: not processes(str(workspace)), 40)


def test_a_paused_schedule_starts_nothing_until_it_is_active_again(
    real_server, finished, tmp_path, teacher, corpus
):
    workspace = shutil.copytree(finished[0], tmp_path / "paused")
    words = [
        word for word in settings(workspace, teacher, corpus) if not word.startswith("workspace=")
    ]
    given = ["--parameter", f"workspace={workspace}", *words]
    done = minitron("deploy", "often", "--cron", "0 2 * * *", *given, env=real_server)
    assert done.returncode == 0, done.stderr
    deployment = named(real_server, "compress/often")
    (schedule,) = deployment.schedules
    switch = [sys.executable, "-m", "prefect", "deployment", "schedule"]

    def switched(word):
        words = [*switch, word, "compress/often", str(schedule.id)]
        done = subprocess.run(words, env=real_server, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    until(lambda: runs_of(real_server, deployment.id, "SCHEDULED"), 30, every=0.5)
    switched("pause")
    until(lambda: not runs_of(real_server, deployment.id, "SCHEDULED"), 30, every=0.5)
    switched("resume")
    until(lambda: runs_of(real_server, deployment.id, "SCHEDULED"), 30, every=0.5)
    ask(real_server, lambda client: client.delete_deployment(deployment.id))


def test_serving_needs_no_worker(real_server, finished, tmp_path, teacher, corpus):
    workspace = shutil.copytree(finished[0], tmp_path / "served")
    log = tmp_path / "log"
    words = [
        "nemo_minitron",
        "serve",
        "served",
        "--flow",
        "evaluate_checkpoint",
        "--parameter",
        f"workspace={tmp_path / 'night'}",
    ]
    with running([*words, *settings(workspace, teacher, corpus)[1:]], real_server, log) as process:

        def there():
            try:
                return named(real_server, "evaluate_checkpoint/served")
            except Exception:
                assert process.poll() is None, log.read_text()
                return None

        until(there, 60)
        run = started_by_hand(real_server, "evaluate_checkpoint/served", {
            "checkpoint": str(workspace / "export"), "data": [str(corpus)],
            "overrides": ["evaluate.speed=false", "evaluate.prompts=0", "data.validation.sequence_length=16", "data.validation.samples=8"],
        })  # fmt: skip
        until(lambda: state_of(real_server, run).is_final(), 120, every=0.5)
        assert state_of(real_server, run).is_completed(), (
            state_of(real_server, run).message,
            log.read_text()[-3000:],
        )
    report = json.loads((tmp_path / "night" / "report" / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "student"]
    assert report["models"]["student"]["parameters"] < report["models"]["teacher"]["parameters"]
    page = (tmp_path / "night" / "report" / "report.html").read_text()
    assert "What was cut" not in page and "Recovery" not in page


def test_without_a_server_nothing_is_promised(tmp_path, capsys):
    environment = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": ""}
    done = minitron("deploy", "x", env=environment)
    assert done.returncode == 2 and "no Prefect server" in done.stderr
    done = minitron("serve", "x", "--cron", "* * * * *", env=environment)
    assert done.returncode == 2 and "no Prefect server" in done.stderr
    for words, text in (
        (["--cron", "every night"], "--cron: no schedule 'every night' in UTC"),
        (
            ["--flow", "prune"],
            "--flow: no flow 'prune'; there are: compress, search, sweep, evaluate_checkpoint",
        ),
        (
            ["--parameter", "sizes=3"],
            "--parameter: compress has no parameter 'sizes'; it has: config_name, ",
        ),
        (["plan.hiden=3"], "plan.hiden: no such configuration key; nearest known: plan.hidden"),
    ):
        code, said = main(["deploy", "x", *words]), capsys.readouterr().err
        assert code == 2 and text in said and "Traceback" not in said, said
    assert os.environ.get("PREFECT_API_URL") is None


def test_automations_of_the_documentation_are_taken_and_a_failed_gate_is_an_event(
    real_server, finished, tmp_path, teacher, corpus
):
    from prefect.events.filters import EventFilter, EventNameFilter

    words = [
        sys.executable,
        "-m",
        "prefect",
        "automation",
        "create",
        "--from-file",
        "docs/automations.yaml",
    ]
    done = subprocess.run(
        words, env=real_server, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {
        automation.name: automation
        for automation in ask(real_server, lambda client: client.read_automations())
    }
    assert set(made) == {"nemo_minitron failed", "nemo_minitron quality gate", "nemo_minitron lost"}
    workspace = shutil.copytree(finished[0], tmp_path / "gated")
    shutil.rmtree(workspace / "export")
    done = minitron(
        "run", *settings(workspace, teacher, corpus), "evaluate.min_retention=50", env=real_server
    )
    assert done.returncode == 1 and "the quality gate failed" in done.stderr
    assert not (workspace / "export").exists()

    async def events(client):
        wanted = {
            "filter": EventFilter(
                event=EventNameFilter(name=["nemo_minitron.gate.failed"])
            ).model_dump(mode="json")
        }
        return (await client._client.post("/events/filter", json=wanted)).json()["events"]

    (event,) = until(
        lambda: [
            event
            for event in ask(real_server, events)
            if event["resource"]["prefect.resource.name"] == "gated"
        ],
        30,
    )
    assert "perplexity retention" in event["payload"]["reason"]
