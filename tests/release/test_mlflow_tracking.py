"""Stages in MLflow: the real client against a database on disk, and against servers in trouble."""

import contextlib
import http.server
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_minitron.release.mlflow_tracking import IDENTITY, check, track
from nemo_minitron.workspace.build import discard, make
from nemo_minitron.workspace.manifest import Input, hash_file, read_manifest
from nemo_minitron.workspace.training_log import read_log, write_csv

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # these tests import it themselves
mlflow = pytest.importorskip("mlflow")

TOKEN = "hf_abcdefghijklmnop"
CONFIG = {
    "trainer": {"max_steps": 4, "precision": "bf16"},
    "optim": {"lr": 0.005},
    "layers": [1, 2],
    "kept": None,
}
LINES = [
    {"step": 1, "tokens": 64, "loss": 3.5, "lr": 0.001},
    {"step": 4, "tokens": 256, "loss": 2.25, "lr": 0.002},
    {"step": 4, "tokens": 256, "val_loss": 2.5},
]
PICTURE = b"\x89PNG\r\n\x1a\n no picture, but its bytes are compared"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database with MLflow's tables; to make them takes seconds, to copy them none."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def place(empty, tmp_path):
    shutil.copy(empty, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def artifact(
    workspace, name="student", config=CONFIG, lines=LINES, page="<html>a page</html>", inputs=()
):
    """A finished artifact with everything that a stage may leave, weights included."""

    def build(folder):
        (folder / "hf").mkdir()
        (folder / "hf" / "model.safetensors").write_bytes(b"weights")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_csv(read_log(folder / "metrics.jsonl"), folder / "metrics.csv")
        (folder / "report.html").write_text(page)
        (folder / "report.json").write_text("{}")
        (folder / "plots").mkdir()
        (folder / "plots" / "training.png").write_bytes(PICTURE)
        (folder / "plots" / "scores.safetensors").write_bytes(b"weights")

    make(workspace / name, name, config, inputs or [Input("pruned", "a" * 64)], build)
    return workspace / name


def log(place, folder, stage="distill", facts=None, headline="loss 2.25", identity="the workspace"):
    return track(
        place, "trials", "run-7", folder, stage, {} if facts is None else facts, headline, identity
    )


def the_run(place, identity="the workspace"):
    """The client and the only run with that identity."""
    client = mlflow.MlflowClient(place)
    experiment = client.get_experiment_by_name("trials").experiment_id
    runs = [run for run in client.search_runs([experiment]) if run.data.tags[IDENTITY] == identity]
    assert len(runs) == 1
    return client, runs[0]


def points(client, run, name):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def files(client, run, folder=""):
    found = []
    for item in client.list_artifacts(run.info.run_id, folder):
        found += files(client, run, item.path) if item.is_dir else [item.path]
    return sorted(found)


def test_what_a_stage_logs_can_be_read_back(place, tmp_path):
    teacher = [Input("org/model", "f" * 64)]
    make(tmp_path / "teacher", "teacher", {"revision": "c0ffee"}, teacher, lambda folder: None)
    folder = artifact(tmp_path)
    facts = {
        "student": {"loss": 2.25, "cases": [{"ms": 7}], "top1": None, "fit": True},
        "note": "words",
    }
    assert log(place, folder, facts=facts) is None
    client, run = the_run(place)
    manifest = read_manifest(folder)
    assert run.info.run_name == "run-7" and run.info.status == "FINISHED"
    assert run.info.start_time < run.info.end_time
    assert set(run.data.metrics) == {
        "distill/student/loss", "distill/student/cases/0/ms", "distill/curve/tokens", "distill/curve/loss",
        "distill/curve/lr", "distill/curve/val_loss",
    }  # fmt: skip
    assert points(client, run, "distill/student/loss") == [(0, 2.25)]
    assert points(client, run, "distill/curve/loss") == [(1, 3.5), (4, 2.25)]
    assert points(client, run, "distill/curve/val_loss") == [(4, 2.5)]
    assert points(client, run, "distill/curve/tokens") == [
        (1, 64),
        (4, 256),
    ]  # step 4 has two lines
    assert run.data.params == {
        "distill.trainer.max_steps": "4", "distill.trainer.precision": "bf16", "distill.optim.lr": "0.005",
        "distill.layers": "[1, 2]", "distill.kept": "null",
    }  # fmt: skip
    tags = {name.removeprefix("minitron."): text for name, text in run.data.tags.items()}
    assert tags["distill.fingerprint"] == manifest.fingerprint
    assert (tags["distill.kind"], tags["distill.headline"]) == ("student", "loss 2.25")
    assert (tags["distill.package"], tags["distill.finished"]) == (
        manifest.package,
        manifest.finished,
    )
    assert json.loads(tags["distill.inputs"]) == [{"path": "pruned", "fingerprint": "a" * 64}]
    assert (tags["source.model"], tags["source.revision"]) == ("org/model", "c0ffee")
    assert tags["source.fingerprint"] == "f" * 64
    names = ["metrics.csv", "plots/training.png", "report.html", "report.json"]
    assert files(client, run) == [f"distill/{name}" for name in names]  # no weights
    for name in names:
        stored = client.download_artifacts(run.info.run_id, f"distill/{name}", str(tmp_path))
        assert Path(stored).read_bytes() == (folder / name).read_bytes()
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(
        tmp_path / "mlartifacts"
    )


def test_the_same_artifact_is_logged_once(place, tmp_path):
    folder = artifact(tmp_path)
    assert log(place, folder, facts={"loss": 1.5}) is None
    before = hash_file(tmp_path / "mlflow.db")
    shutil.rmtree(tmp_path / "mlartifacts")
    assert log(place, folder, facts={"loss": 1.5}) is None
    assert hash_file(tmp_path / "mlflow.db") == before
    assert not (tmp_path / "mlartifacts").exists()  # no file was sent again
    assert (
        log(place, folder, stage="baseline", facts={"loss": 1.5}) is None
    )  # the hash does show what is logged
    assert hash_file(tmp_path / "mlflow.db") != before


def test_a_workspace_has_one_run(place, tmp_path):
    assert log(place, artifact(tmp_path / "one"), facts={"loss": 1.5}) is None
    assert (
        log(place, artifact(tmp_path / "one", "report"), "evaluate", {"student": {"loss": 1.25}})
        is None
    )
    assert (
        log(place, artifact(tmp_path / "two"), facts={"loss": 9}, identity="it's another") is None
    )
    assert (
        log(place, artifact(tmp_path / "two", "report"), "evaluate", identity="it's another")
        is None
    )
    _, run = the_run(place)
    assert (
        run.data.metrics["distill/loss"] == 1.5
        and run.data.metrics["evaluate/student/loss"] == 1.25
    )
    _, other = the_run(place, "it's another")
    assert other.data.metrics["distill/loss"] == 9 and "evaluate.optim.lr" in other.data.params


def test_an_artifact_that_is_made_anew(place, tmp_path):
    folder = artifact(tmp_path)
    assert log(place, folder, facts={"loss": 2.25}) is None
    discard(folder)
    changed = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 2}, "new": 1}
    artifact(tmp_path, config=changed, lines=[{"step": 2, "loss": 1.0}])
    assert log(place, folder, facts={"loss": 1.0}, headline="anew") is None
    client, run = the_run(place)
    assert run.data.metrics["distill/loss"] == 1.0  # the newest is what MLflow shows
    assert points(client, run, "distill/loss") == [(0, 2.25), (1, 1.0)]
    assert points(client, run, "distill/curve/loss") == [(1, 3.5), (4, 2.25)]
    assert points(client, run, "distill.v2/curve/loss") == [(2, 1.0)]
    assert run.data.params["distill.trainer.max_steps"] == "4"
    versioned = {
        name: text for name, text in run.data.params.items() if name.startswith("distill.v2")
    }
    assert versioned == {"distill.v2.trainer.max_steps": "2"}  # what is as it was is not said again
    assert run.data.params["distill.new"] == "1"
    assert run.data.tags["minitron.distill.fingerprint"] == read_manifest(folder).fingerprint
    assert run.data.tags["minitron.distill.headline"] == "anew"
    # the same recipe once more: other bytes under the same fingerprint
    discard(folder)
    artifact(tmp_path, config=changed, lines=[{"step": 2, "loss": 0.5}])
    assert log(place, folder, facts={"loss": 0.5}) is None
    client, run = the_run(place)
    assert points(client, run, "distill.v3/curve/loss") == [(2, 0.5)]
    assert run.data.metrics["distill/loss"] == 0.5
    assert run.data.params["distill.v3.trainer.max_steps"] == "2"


def test_names_and_values_that_mlflow_would_not_take(place, tmp_path):
    config = {"a/b": {"": 1, "..": ""}, "long": "x" * 9000, "k" * 400: 1, "k" * 401: 2}
    config |= {"prompts": ["é" * 3000], **{f"key{i}": "ü" * 5900 for i in range(60)}}
    lines = [{"step": i, "loss": float("nan") if i == 7 else 1 / (i + 1)} for i in range(2500)]
    folder = artifact(tmp_path, config=config, lines=lines)
    facts = {
        "acc,none": 1,
        "acc;none": 2,
        "t@sk": {"..": 3, "/": 4},
        "bad": float("inf"),
        "x" * 300: 5,
    }
    assert log(place, folder, facts=facts) is None
    client, run = the_run(place)
    assert points(client, run, "distill/curve/loss") == [
        (line["step"], line["loss"]) for line in lines if line["step"] != 7
    ]
    found = {name: value for name, value in run.data.metrics.items() if "curve" not in name}
    long = [name for name in found if "xxx" in name]
    assert len(long) == 1 and len(long[0]) <= 250 and found.pop(long[0]) == 5
    assert found == {
        "distill/acc_none": 1,
        "distill/acc_none_2": 2,
        "distill/t_sk/_": 3,
        "distill/t_sk/__2": 4,
    }
    odd = "distill/bad at 0: inf, distill/curve/loss at 7: nan"
    assert run.data.tags["minitron.distill.not_finite"] == odd
    assert run.data.params["distill.a_b._"] == "1" and run.data.params["distill.a_b.__2"] == '""'
    assert run.data.params["distill.long"] == "x" * 5999 + "…"
    assert run.data.params["distill.key59"] == "ü" * 5900
    assert sorted(text for name, text in run.data.params.items() if "kkk" in name) == ["1", "2"]


def test_what_was_interrupted_goes_on(place, tmp_path):
    folder = artifact(tmp_path)
    (tmp_path / "mlartifacts").write_text("a file where the folder for files belongs")
    line = log(place, folder, facts={"loss": 2.25})
    assert line.startswith(f"track.mlflow: distill is not logged at {place}: ") and "\n" not in line
    client, run = the_run(place)
    assert run.data.metrics["distill/loss"] == 2.25  # a part got there
    assert "minitron.distill.logged" not in run.data.tags
    (tmp_path / "mlartifacts").unlink()
    assert log(place, folder, facts={"loss": 2.25}) is None
    client, run = the_run(place)
    assert points(client, run, "distill/loss") == [(0, 2.25)]
    assert points(client, run, "distill/curve/loss") == [(1, 3.5), (4, 2.25)]
    assert not any(name.startswith("distill.v2") for name in (*run.data.metrics, *run.data.params))
    assert "distill/report.html" in files(client, run)


def test_tokens_are_never_stored(place, tmp_path):
    secret = [
        Input(f"https://me:{TOKEN}@hub/model", "a" * 64),
        Input("https://me:password@hub/data", "b" * 64),
    ]
    config = {"hub": {"key": TOKEN, "list": [TOKEN], TOKEN: 1}}
    folder = artifact(tmp_path, config=config, page=f"<p>HF_TOKEN={TOKEN}</p>", inputs=secret)
    assert TOKEN in (folder / "manifest.json").read_text()
    assert (
        track(place, "trials", TOKEN, folder, "distill", {TOKEN: 1.5}, f"with {TOKEN}", "me")
        is None
    )
    client, run = the_run(place, "me")
    assert run.data.params["distill.hub.key"] == "hf_***" and run.info.run_name == "hf_***"
    assert run.data.metrics["distill/hf____"] == 1.5
    stored = [
        tmp_path / "mlflow.db",
        *(path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()),
    ]
    assert len(stored) == 5
    for path in stored:
        assert TOKEN.encode() not in path.read_bytes() and b"password" not in path.read_bytes(), (
            path
        )
    page = client.download_artifacts(run.info.run_id, "distill/report.html", str(tmp_path))
    assert Path(page).read_text() == "<p>HF_TOKEN=hf_***</p>"


class Trouble(http.server.BaseHTTPRequestHandler):
    """Answers everything with an error, and asks for more patience than a stage has."""

    def do_GET(self):
        self.server.asked += 1
        self.send_response(self.server.status)
        self.send_header("Retry-After", "30")
        self.end_headers()
        self.wfile.write(b"<html>\nno good day\n</html>")

    do_POST = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def server(status):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trouble) as running:
        running.status, running.asked = status, 0
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [500, 503, 404])
def test_a_server_in_trouble_costs_seconds_and_a_line(status, tmp_path, caplog, capfd):
    folder = artifact(tmp_path)
    with server(status) as running:
        place, begun = f"http://me:password@127.0.0.1:{running.server_port}", time.monotonic()
        line = log(place, folder)
        assert time.monotonic() - begun < 10
        assert running.asked == (1 if status == 404 else 3)
    assert line.startswith(
        f"track.mlflow: distill is not logged at http://***@127.0.0.1:{running.server_port}: "
    )
    assert "\n" not in line and "password" not in line and len(line) < 400
    assert str(status) in line
    told = capfd.readouterr()
    assert not caplog.records and told.out + told.err == ""


def test_retries_that_the_user_asked_for_are_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server(500) as running:
        assert "500" in log(f"http://127.0.0.1:{running.server_port}", artifact(tmp_path))
        assert running.asked == 1


def test_a_server_that_is_down_costs_seconds_and_a_line(tmp_path, caplog):
    folder = artifact(tmp_path)
    with socket.socket() as closed:  # bound, so that nobody else gets the port; it does not listen
        closed.bind(("127.0.0.1", 0))
        begun = time.monotonic()
        line = log(f"http://127.0.0.1:{closed.getsockname()[1]}", folder)
        assert time.monotonic() - begun < 10
    assert line.startswith("track.mlflow: distill is not logged at http://127.0.0.1:")
    assert "\n" not in line and len(line) < 400 and "Connection refused" in line
    assert not caplog.records


def test_what_cannot_be_logged_is_a_line_too(place, tmp_path):
    assert f"{tmp_path / 'none'}: no complete artifact" in log(place, tmp_path / "none")
    assert "is not logged at nowhere://x: " in log("nowhere://x", artifact(tmp_path))
    client = mlflow.MlflowClient(place)
    client.delete_experiment(client.create_experiment("trials"))
    assert "deleted" in log(place, tmp_path / "student")


def test_workspaces_at_the_same_time(place, tmp_path):
    before = dict(os.environ)
    names = [f"workspace {i}" for i in range(4)]
    folders = [artifact(tmp_path / name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        lines = list(
            pool.map(lambda folder, name: log(place, folder, identity=name), folders, names)
        )
    assert lines == [None] * 4 and dict(os.environ) == before
    for name in names:
        assert the_run(place, name)[1].data.metrics["distill/curve/loss"] == 2.25


def test_what_is_global_stays_as_it_was(place, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    logger = logging.getLogger("mlflow")
    before = (mlflow.get_tracking_uri(), dict(os.environ), logger.level, logging.getLogger().level)
    assert log(place, artifact(tmp_path)) is None
    after = (mlflow.get_tracking_uri(), dict(os.environ), logger.level, logging.getLogger().level)
    assert after == before
    assert mlflow.active_run() is None
    assert the_run(place)[1].data.params["distill.optim.lr"] == "0.005"


def python(code, home):
    """Runs a program in an environment in which nothing else switches telemetry off."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent.parent
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root, timeout=120, check=False
    )  # fmt: skip


def test_nothing_is_sent_home_and_mlflow_comes_late(place, tmp_path):
    done = python(
        "import os, sys\nfrom pathlib import Path\n"
        "def hook(event, values):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): os.write(2, repr(values).encode())\n"
        "sys.addaudithook(hook)\n"
        "from nemo_minitron.release.mlflow_tracking import check, track\n"
        "check()\nassert 'mlflow' not in sys.modules\n"
        f"print(track({place!r}, 'trials', 'run', Path({str(artifact(tmp_path))!r}), 'distill', {{}}, '', 'me'))\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n" and done.stderr == ""
    assert the_run(place, "me")[1].data.params["distill.optim.lr"] == "0.005"


def test_without_mlflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    text = r"track\.mlflow: needs the package mlflow: pip install 'nemo-minitron\[mlflow\]'"
    with pytest.raises(ValueError, match=text):
        check()
    with pytest.raises(ValueError, match=text):
        log("sqlite:///never.db", tmp_path)
