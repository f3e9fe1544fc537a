"""Stages as Prefect tasks, on Prefect's real engine: tries, limits, crashes, memory, slots, artifacts."""

import contextvars
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from nemo_minitron.config.compose import as_dict, load_config
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import StageError
from tests.support.flow_runs import artifacts_of, in_a_flow, read
from tests.support.processes import until
from tests.support.runs import settings


def test_passing_failures_are_tried_again_and_the_users_are_not(server, played, tmp_path):
    seen = played(ConnectionError("the hub cannot be reached"), ConnectionResetError("reset"), None)
    result, failure, run, _ = in_a_flow("download", workspace=tmp_path / "a")
    assert failure is None and result.headline == "done"
    assert len(seen) == run.run_count == 3
    for wrong in (
        ValueError("plan.hidden: expected 1 to 24"),
        KeyError("damaged"),
        OSError(28, "No space left"),
    ):
        seen = played(wrong)
        _, failure, run, _ = in_a_flow("plan", workspace=tmp_path / "b")
        assert type(failure) is type(wrong) and len(seen) == 1 and run.state.name == "Failed"


def test_enough_is_enough(server, played, tmp_path):
    seen = played(*[ConnectionError("no")] * 9)
    _, failure, run, _ = in_a_flow("download", "launch.retries=2", workspace=tmp_path / "a")
    assert isinstance(failure, ConnectionError) and len(seen) == 3 and run.state.name == "Failed"
    seen = played(*[ConnectionError("no")] * 9)
    _, failure, _, _ = in_a_flow("download", "launch.retries=0", workspace=tmp_path / "a")
    assert isinstance(failure, ConnectionError) and len(seen) == 1


def test_out_of_memory_takes_half_of_the_micro_batch_and_twice_as_many(server, played, tmp_path):
    out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    words = ("distill.batch_size=4", "trainer.accumulate_grad_batches=3")
    seen = played(out, out, None)
    result, failure, _, _ = in_a_flow("distill", *words, workspace=tmp_path / "a")
    assert failure is None and result.headline == "done"
    sizes = [(c.distill.batch_size, c.trainer["accumulate_grad_batches"]) for c in seen]
    assert sizes == [(4, 3), (2, 6), (1, 12)]
    seen = played(None)  # the next run knows
    in_a_flow("distill", *words, workspace=tmp_path / "a")
    assert seen[0].distill.batch_size == 1
    seen = played(out, out)
    _, failure, run, _ = in_a_flow("distill", "distill.batch_size=1", workspace=tmp_path / "b")
    assert "its micro-batch cannot be made smaller" in str(failure) and len(seen) == 1
    assert run.state.name == "Failed"


def test_a_lost_stage_is_reported_as_crashed_in_the_end(server, played, tmp_path):
    lost = StageError("distill", failures.LOST, "distill: its process was killed by SIGKILL")
    seen = played(lost, lost)
    _, failure, run, _names = in_a_flow("distill", "launch.retries=1", workspace=tmp_path / "a")
    assert len(seen) == 2 and isinstance(failure, StageError) and failure.kind == failures.LOST
    assert run.state.is_crashed() and "killed by SIGKILL" in run.state.message


def test_a_stage_that_takes_too_long_is_ended_and_not_tried_again(server, played, tmp_path):
    seen = played(lambda: time.sleep(60), None)
    _, failure, run, _ = in_a_flow("score", "+launch.time_limits.score=1", workspace=tmp_path / "a")
    assert "score: over its time limit of 1 s" in str(failure) and len(seen) == 1
    assert run.state.name == "TimedOut"


def test_a_process_over_its_limit_is_timed_out_too(server, played, tmp_path):
    seen = played(StageError("score", failures.SLOW, "score: over its time limit of 1 s"), None)
    _, failure, run, _ = in_a_flow("score", workspace=tmp_path / "a")
    assert (
        "over its time limit" in str(failure) and failure.kind == failures.SLOW and len(seen) == 1
    )
    assert run.state.name == "TimedOut" and run.state.is_failed()


def test_a_server_that_is_away_costs_no_stage_that_is_done(server, played, tmp_path, monkeypatch):
    from nemo_minitron.flows import publish

    def away(*_):
        raise ConnectionError("All connection attempts failed")

    monkeypatch.setattr(publish, "stage", away)
    seen = played(None, None)
    result, failure, run, _ = in_a_flow("score", workspace=tmp_path / "a")
    assert (
        failure is None
        and result.headline == "done"
        and len(seen) == 1
        and run.state.is_completed()
    )


def test_locks_on_accelerators_are_for_all_users_of_a_machine(monkeypatch, tmp_path):
    import tempfile

    from nemo_minitron.workspace.accelerator_lock import locks

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.umask(0o077)
    try:
        folders = [locks(), locks()]
    finally:
        os.umask(before)
    assert folders[0] == folders[1] and folders[0].stat().st_mode & 0o7777 == 0o777


def test_flows_that_share_an_accelerator_wait_for_each_other(server, played, tmp_path):
    """Two flows of two processes would do the same: the slots are the server's."""
    from prefect import flow

    from nemo_minitron.flows.tasks import run_stage_task

    at_once, most, lock = [0], [0], threading.Lock()
    together = threading.Barrier(2)

    def compute():
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.5)
        with lock:
            at_once[0] -= 1

    def both(name, work, *words):
        played(work, work)
        configs = [
            load_config("config", [f"workspace={tmp_path / str(i)}", *words]) for i in (1, 2)
        ]

        @flow
        def one(number):
            return run_stage_task(name, configs[number], as_dict(configs[number]))

        # which server they talk to is in the context
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(one, number))
            for number in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    both("distill", compute, "launch.accelerator=gpu-0")
    assert most[0] == 1
    both("distill", lambda: together.wait(30))  # each is at work while the other is
    both("plan", lambda: together.wait(30), "launch.accelerator=gpu-0")  # it computes nothing
    assert not together.broken


def test_prefect_shows_summaries_tables_links_pictures_and_lineage(
    server, finished, tmp_path, teacher, corpus
):
    from nemo_minitron.flows.compress import compress

    workspace = shutil.copytree(finished[0], tmp_path / "shown")
    config = load_config("config", settings(workspace, teacher, corpus))
    results = compress(config=as_dict(config))
    assert [result.made for result in results] == [False] * 8
    compress(config=as_dict(config))

    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    mine = FlowRunFilter(name=FlowRunFilterName(any_=["compress-shown"]))
    assert len(read(lambda client: client.read_flow_runs(flow_run_filter=mine))) == 2
    artifacts = artifacts_of("shown")
    rows = json.loads(artifacts["minitron-shown-evaluate-table"][0].data)
    assert [row["measure"] for row in rows][:2] == [
        "parameters",
        "held-out loss",
    ] and "distilled" in rows[0]
    assert artifacts["minitron-shown-score-ffn"][0].data.startswith("data:image/png;base64,")
    assert (workspace / "export").resolve().as_uri() in artifacts["minitron-shown-export-folder"][
        0
    ].data
    assert len(artifacts["minitron-shown-distill"]) == 2  # the same key in every run
    assert "12 steps, held-out loss" in artifacts["minitron-shown-distill"][0].data
    lineage = artifacts["minitron-shown-lineage"][0].data
    assert lineage.index("| report |") < lineage.index("| student |") < lineage.index("| teacher |")
    assert str(teacher) in lineage and "files, train)" in lineage


def test_progress_is_an_artifact_that_moves(server, played, tmp_path, monkeypatch):
    from nemo_minitron.flows import publish
    from nemo_minitron.workspace import progress

    monkeypatch.setattr(publish, "_SHOW_SECONDS", 0.2)

    def work():
        for step in (25, 50):
            progress.note("training", step, 100)
            time.sleep(1.2)

    played(work)
    in_a_flow("distill", workspace=tmp_path / "Moving On")

    (artifact,) = artifacts_of("moving-on")["minitron-moving-on-distill-progress"]
    assert (artifact.type, float(artifact.data)) == ("progress", 50.0)
    assert artifact.description == "distill: training, 50 of 100"


STOPPED = """
import json, sys
from nemo_minitron.flows.compress import compress
compress(config=json.load(open(sys.argv[1])))
"""


def test_a_flow_that_is_told_to_end_saves_first_and_leaves_no_process(
    server, finished, tmp_path, teacher, corpus
):
    """With stages in its own process; with processes of their own the deployments' tests see to it."""
    import psutil
    from prefect.settings import PREFECT_API_URL

    workspace = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workspace / "student")
    long = ("trainer.max_steps=100000", "trainer.val_check_interval=50000", "launch.kind=inline",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=100000")  # fmt: skip
    config = load_config("config", [*settings(workspace, teacher, corpus), *long])
    values = tmp_path / "values.json"
    values.write_text(json.dumps(as_dict(config)))
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    flow = subprocess.Popen([sys.executable, "-c", STOPPED, str(values)], env=environment)
    log = workspace / "student" / "state" / "metrics.jsonl"
    until(
        lambda: flow.poll() is not None or (log.is_file() and log.read_text().count("loss") > 20),
        every=0.05,
    )
    assert flow.poll() is None
    others = psutil.Process(flow.pid).children(recursive=True)
    asked = time.monotonic()
    flow.send_signal(signal.SIGTERM)
    assert flow.wait(60) != 0
    assert time.monotonic() - asked < 20
    _gone, alive = psutil.wait_procs(others, timeout=10)
    assert not alive
    saved = [
        int(path.stem.split("=")[1])
        for path in (workspace / "student" / "state").rglob("step=*.ckpt")
    ]
    assert saved and max(saved) >= 20


def test_two_flows_on_one_workspace(server, played, tmp_path):
    from nemo_minitron.flows.compress import compress
    from nemo_minitron.workspace.locks import locked

    config = load_config("config", [f"workspace={tmp_path / 'ws'}"])
    busy = threading.Event()

    def hold(seconds):
        with locked(tmp_path / "ws"):
            busy.set()
            time.sleep(seconds)

    holder = threading.Thread(target=hold, args=(3,))
    holder.start()
    busy.wait()
    text = rf"ws: another run is using it \(process {os.getpid()} on .*, since .* UTC\); wait for it to end"
    with pytest.raises(ValueError, match=text):
        compress(config=as_dict(config))
    config.launch.wait = 60
    seen = played(ValueError("source.model: nothing given"))
    with pytest.raises(ValueError, match="nothing given"):  # it waited, and then had its turn
        compress(config=as_dict(config))
    assert len(seen) == 1
    holder.join()


def test_the_command_that_is_written_down_composes_the_same():
    from nemo_minitron.flows.forms import Launch, Sizes, cli_words, composed

    given = {
        "overrides": ["distill.kl=2"], "workspace": "runs/what's new", "model": "org/tiny",
        "data": ["a folder/*.txt", "hf://owner/name", "C:\\text\\"], "plan": Sizes(hidden=8, layers=2),
        "launch": Launch(kind="subprocess", accelerator="gpu-0", wait=3600, retries=0),
    }  # fmt: skip
    line = cli_words("config", **given)
    assert as_dict(load_config("config", line)) == as_dict(composed("config", **given))
    assert "plan.hidden=8" in line and "workspace='runs/what\\'s new'" in line
    assert cli_words("demo", None) == ["--config-name", "demo"]


def test_parameters_are_forms_with_bounds(server):
    from nemo_minitron.flows.compress import compress

    schema = compress.parameters.model_dump()
    assert schema["properties"]["plan"]["title"] == "plan"
    sizes = schema["definitions"]["Sizes"]["properties"]
    assert sizes["hidden"]["description"] == "width of the residual stream"
    launch = schema["definitions"]["Launch"]["properties"]
    assert {"maximum": 1000, "minimum": 0, "type": "integer"} in launch["retries"]["anyOf"]
    kinds = next(entry for entry in launch["kind"]["anyOf"] if "enum" in entry)
    assert kinds["enum"] == ["inline", "subprocess", "torchrun", "slurm"]
    assert all(entry.get("description") for entry in schema["properties"].values())
