"""The whole pipeline: real Prefect with its embedded server, real processes, killed for real."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nemo_minitron.cli.main import main
from nemo_minitron.workspace.artifacts import artifacts_in
from nemo_minitron.workspace.manifest import read_manifest
from tests.support.processes import until
from tests.support.runs import command_line, kill_group, minitron, settings, started

NAMES = ["teacher", "scores", "plan", "pruned", "student", "scratch", "report", "export"]


def prints(workspace):
    return {folder.name: read_manifest(folder).fingerprint for folder in artifacts_in(workspace)}


def contents(workspace):
    """Hashes of everything whose bytes must not depend on how often a run was interrupted."""
    kept = ["scores", "plan", "pruned", "student", "scratch"]
    return {
        name: {
            out.file: out.sha256
            for out in read_manifest(workspace / name).outputs
            if not out.file.startswith("metrics.")
        }
        for name in kept
    }


def test_every_artifact_is_there_and_verifies(capsys, finished):
    workspace, out = finished
    assert list(prints(workspace)) == NAMES
    capsys.readouterr()
    assert main(["verify", str(workspace)]) == 0
    assert capsys.readouterr().out == "9 artifacts checked, 0 problems\n"
    for name in ("teacher", "pruned", "distilled", "from scratch"):
        assert name in out
    manifest = read_manifest(workspace / "student")
    sources = [item.path for item in manifest.inputs]
    assert sources[0] == "pruned" and "teacher" in sources
    assert not (workspace / "student" / "state").exists()


def test_the_export_works_where_only_transformers_is_known(finished, tmp_path):
    workspace, _ = finished
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
outputs = model.generate(**tokenizer("the model", return_tensors="pt"), max_length=50)
print(repr(tokenizer.decode(outputs[0], skip_special_tokens=True)))
assert outputs.shape[1] > 3
assert not [name for name in sys.modules if name.startswith("nemo")]
"""
    moved = shutil.copytree(workspace / "export", tmp_path / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(moved)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    card = (moved / "README.md").read_text()
    assert "from_pretrained(path, dtype=torch.bfloat16)" in card
    lineage = json.loads((moved / "minitron.json").read_text())
    assert [stage["kind"] for stage in lineage["stages"]] == NAMES[:-1]
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (moved / name).read_bytes() == (workspace / "pruned" / name).read_bytes()


def test_the_report_is_one_file_with_numbers_and_pictures(finished):
    workspace, _ = finished
    page = (workspace / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # curves; hidden, ffn, heads, layers
    assert "http" not in page.replace("http-equiv", "")
    report = json.loads((workspace / "report" / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "pruned", "student", "scratch"]
    for row in report["models"].values():
        assert set(row["tasks"]) == {"held_out_choice", "held_out_bytes"}
    student = report["models"]["student"]
    assert student["parameters"] < report["models"]["teacher"]["parameters"]
    counted = {row["task"]: row["documents"] for row in report["compared"]}
    (data,) = workspace.rglob("held_out_bytes.jsonl")
    documents = data.read_text().count("\n")
    assert counted["held_out_choice"] == documents < 20  # of which the twenty questions are


@pytest.mark.slow
def test_speeds_are_measured_where_they_are_asked_for(finished, tmp_path, teacher, corpus):
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    before = set((workspace / "results").glob("*.json"))
    words = [
        *settings(workspace, teacher, corpus), "evaluate.speed=true", "evaluate.from_scratch=false",
        "evaluate.prompt_tokens=16", "evaluate.new_tokens=4",
    ]  # fmt: skip
    assert main(["evaluate", *words]) == 0
    report = json.loads((workspace / "report" / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "pruned", "student"]
    for row in report["models"].values():
        assert [case["batch"] for case in row["speed"]["cases"]] == [1, 8]
        assert all(case["decode_tokens_per_second"] > 0 for case in row["speed"]["cases"])
    # nothing else was measured again
    assert len(set((workspace / "results").glob("*.json")) - before) == 3


def test_lm_eval_agrees_with_our_own_loss(finished, teacher):
    """bits_per_byte of lm-eval against the same documents scored by hand with plain transformers."""
    import math

    import torch
    import transformers

    workspace, _ = finished
    report = json.loads((workspace / "report" / "report.json").read_text())
    (made,) = (workspace / "results").glob("tasks-*")
    lines = (made / "held_out_bytes.jsonl").read_text().splitlines()[:20]
    texts = [json.loads(line)["text"] for line in lines]
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    nats, size = 0.0, 0
    window = model.config.max_position_embeddings
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        size += len(text.encode())
        for start in range(0, len(ids) - 1, window):
            stop = min(start + window, len(ids) - 1)
            begin = max(
                0, stop - window
            )  # the last window is moved back to be full, as lm-eval does
            with torch.inference_mode():
                logits = model(torch.tensor([ids[begin:stop]])).logits[0].double()
            picked = torch.log_softmax(logits, -1).gather(
                1, torch.tensor(ids[begin + 1 : stop + 1])[:, None]
            )[:, 0]
            nats -= float(picked[start - begin :].sum())
    found = report["models"]["teacher"]["tasks"]["held_out_bytes"]["bits_per_byte"]
    assert found == pytest.approx(nats / math.log(2) / size, rel=2e-3)


def test_again_everything_is_found_done_and_a_deleted_artifact_is_rebuilt_with_what_follows(
    served, finished, tmp_path, teacher, corpus
):
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    before, bytes_before = prints(workspace), contents(workspace)
    started = {name: read_manifest(workspace / name).started for name in NAMES}
    again = minitron("run", *settings(workspace, teacher, corpus), env=served)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stderr.count("(already done)") == 8
    assert {name: read_manifest(workspace / name).started for name in NAMES} == started
    shutil.rmtree(workspace / "pruned")
    rebuilt = minitron("run", *settings(workspace, teacher, corpus), env=served)
    assert rebuilt.returncode == 0, rebuilt.stderr[-2000:]
    assert rebuilt.stderr.count("(already done)") == 3
    anew = [name for name in NAMES if read_manifest(workspace / name).started != started[name]]
    assert anew == ["pruned", "student", "scratch", "report", "export"]
    assert prints(workspace) == before
    assert contents(workspace) == bytes_before


def killed_when(condition, arguments, env):
    """Starts a command and sends SIGKILL as soon as the condition holds."""
    process = started(*arguments, env=env)
    until(lambda: process.poll() is not None or condition(), 240, 0.01)
    assert process.poll() is None, "it ended before it could be killed"
    kill_group(process)


def steps_logged(folder: Path) -> int:
    path = folder / "state" / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def test_killed_in_the_middle_it_ends_with_the_same_bytes(
    served, finished, tmp_path, teacher, corpus
):
    workspace = tmp_path / "killed"
    arguments = ["run", *settings(workspace, teacher, corpus)]
    killed_when(lambda: (workspace / "plan" / "manifest.json").is_file(), arguments, served)
    killed_when(lambda: steps_logged(workspace / "student") >= 6, arguments, served)
    saved = list((workspace / "student" / "state" / "nemo" / "checkpoints").glob("*.ckpt"))
    assert saved, "no checkpoint after six steps"
    assert not (workspace / "student" / "manifest.json").exists()
    killed_when(lambda: (workspace / ".report.partial").is_dir(), arguments, served)
    done = minitron(*arguments, env=served)
    assert done.returncode == 0, done.stderr[-2000:]
    assert prints(workspace) == prints(finished[0])
    assert contents(workspace) == contents(finished[0])
    assert not list(workspace.glob(".*partial"))


def test_a_failed_gate_stops_before_the_export(finished, tmp_path, teacher, corpus):
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workspace / "export")
    done = minitron("evaluate", *settings(workspace, teacher, corpus), "evaluate.min_retention=50")
    assert done.returncode == 1
    assert "the quality gate failed, nothing is exported: perplexity retention: " in done.stderr
    assert ", asked for >= 5000.0% (report.html has the numbers)" in done.stderr
    assert not (workspace / "export").exists()
    around = minitron("export", *settings(workspace, teacher, corpus), "evaluate.min_retention=50")
    assert around.returncode == 1
    assert not (workspace / "export").exists()


def test_standard_output_is_json_alone_also_with_progress_bars(finished, tmp_path, teacher, corpus):
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workspace / "student")
    overrides = [*settings(workspace, teacher, corpus), "trainer.enable_progress_bar=true"]
    done = minitron("distill", "--json", *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["made"] is True
    assert "12/12" in done.stderr


def test_the_baseline_stage_follows_only_when_asked_for(finished):
    from nemo_minitron.config.config import Config
    from nemo_minitron.flows.compress import steps

    config = Config()
    assert list(steps(config)) == [
        "download",
        "score",
        "plan",
        "prune",
        "distill",
        "evaluate",
        "export",
    ]
    config.pretrain.enabled = config.correct.enabled = config.evaluate.from_scratch = True
    assert list(steps(config)) == [
        "pretrain", "download", "correct", "score", "plan", "prune", "distill", "baseline", "evaluate", "export",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_the_embedded_server_ends_with_the_run_and_not_before(
    finished, tmp_path, teacher, corpus, how
):
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workspace / "student")
    words = [
        *settings(workspace, teacher, corpus),
        "trainer.max_steps=100000",
        "trainer.val_check_interval=50000",
    ]
    process = started("run", *words)
    until(lambda: process.poll() is not None or steps_logged(workspace / "student") > 5, 240, 0.05)
    assert process.poll() is None
    others = psutil.Process(process.pid).children(recursive=True)
    assert any("embedded_server" in command_line(other) for other in others)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does: to every process
    else:
        process.send_signal(how)
    try:
        _, told = process.communicate(timeout=40)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 1 and told.strip().endswith(
            "minitron run: interrupted; run it again to resume"
        )
    assert not psutil.wait_procs(others, timeout=20)[1]


@contextlib.contextmanager
def starting(workspace, teacher, corpus):
    """A run in a process group of its own, from its begin."""
    process = started("run", *settings(workspace, teacher, corpus))
    try:
        yield process
    finally:
        kill_group(process)


PROGRAM = """import sys
sys.path.pop(0)  # as for the installed program, whose folder is not the working folder
from nemo_minitron.cli.main import main
sys.exit(main())"""


def server_of(process):
    """The embedded server that a run has started."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [each for each in children if "embedded_server" in command_line(each)]


def test_sigterm_to_the_whole_group_ends_a_run_like_ctrl_c(tmp_path, teacher, corpus):
    with starting(tmp_path / "run", teacher, corpus) as process:
        until(lambda: process.poll() is not None or (tmp_path / "run" / "teacher").is_dir())
        (server,) = server_of(process)
        os.killpg(process.pid, signal.SIGTERM)  # as timeout, systemd and batch systems do
        _, told = process.communicate(timeout=60)  # for a server that is gone Prefect waits 70 s
    assert process.returncode == 143
    assert told.splitlines()[-1] == "minitron run: ended by SIGTERM; run it again to resume"
    assert not psutil.wait_procs([server], timeout=20)[1]


def test_the_run_that_came_first_keeps_the_workspace(tmp_path, teacher, corpus):
    workspace = tmp_path / "run"
    with starting(workspace, teacher, corpus) as first:
        until(lambda: server_of(first))  # Prefect is starting: no stage has begun
        second = minitron("run", *settings(workspace, teacher, corpus))
        assert second.returncode == 2
        assert f"another run is using it (process {first.pid} on" in second.stderr
        first.send_signal(signal.SIGTERM)
        first.communicate()
    assert not workspace.exists()  # neither of them has made anything


@pytest.mark.slow
def test_surroundings_do_not_keep_the_embedded_server_from_starting(tmp_path):
    """A proxy, a module of the standard library's name, a home that is not there yet."""
    for name in ("tokenize", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    done = subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM),
            *("run", "source.model=./missing", "workspace=w"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
        check=False,
        env={
            **{k: v for k, v in os.environ.items() if k.upper() != "NO_PROXY"},
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "ALL_PROXY": "http://127.0.0.1:9",
            "PREFECT_HOME": str(tmp_path / "not" / "there"),
        },
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[-2000:]
    assert done.stderr.endswith("minitron run: missing: no such folder\n")
    assert (tmp_path / "not" / "there" / "prefect.db").is_file()


def test_a_prefect_home_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    done = minitron(
        "run",
        "source.model=./missing",
        f"workspace={tmp_path / 'w'}",
        env={"PREFECT_HOME": str(tmp_path / "file" / "home"), "PREFECT_API_URL": ""},
        timeout=60,
    )
    assert done.returncode == 2
    assert f"PREFECT_HOME: {tmp_path / 'file' / 'home'} cannot be written" in done.stderr


def test_a_run_killed_while_its_server_starts_leaves_no_server(tmp_path, teacher, corpus):
    with starting(tmp_path / "run", teacher, corpus) as process:
        servers = until(lambda: server_of(process))
        process.kill()
        process.communicate()
        # before the group is killed, with the server in it
        assert not psutil.wait_procs(servers, timeout=30)[1]


def test_a_report_about_another_model_judges_no_export(finished, tmp_path, teacher, corpus):
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    words = [
        *settings(workspace, teacher, corpus),
        "evaluate.speed=false",
        "evaluate.from_scratch=false",
    ]
    done = minitron("evaluate", *words, f"evaluate.model={teacher}")
    assert done.returncode == 0, done.stderr[-2000:]
    done = minitron("export", *words)
    assert (
        done.returncode == 2
        and "measures another model than this workspace's student" in done.stderr
    )


def test_hosts_that_a_user_excludes_from_the_proxy_stay_excluded(monkeypatch):
    """Programs differ in which of the two variables they read."""
    from nemo_minitron.flows.local import prepare_environment

    for name in ("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "PREFECT_SERVER_ANALYTICS_ENABLED",
                 "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "DO_NOT_TRACK", "PREFECT_HOME"):  # fmt: skip
        monkeypatch.setenv(name, os.environ.get(name, "1") if name != "PREFECT_HOME" else "/tmp")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "hub.internal")
    monkeypatch.setenv("NO_PROXY", "")
    prepare_environment()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "hub.internal,127.0.0.1,localhost"


def test_the_flow_refuses_in_one_line_too_and_leaves_nothing(served, tmp_path, teacher):
    workspace = tmp_path / "ws"
    common = [f"workspace={workspace}", f"source.model={teacher}", "score.importance=magnitude"]
    words = (f"workspace={workspace}", "source.model=./nowhere")
    done = minitron("run", *words, cwd=tmp_path, env=served)
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0), done.stderr
    assert done.stderr.splitlines()[-1] == "minitron run: nowhere: no such folder"
    assert not workspace.exists()
    done = minitron("run", *common, "plan.hidden=99", env=served)
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0), done.stderr
    assert "plan.hidden: expected 1 to 24" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in workspace.iterdir()) == [
        ".lock",
        ".stage.lock",
        "commands.jsonl",
        "scores",
        "teacher",
    ]
