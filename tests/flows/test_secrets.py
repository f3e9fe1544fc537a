"""Credentials wherever a user can put them, real runs, and then a look into every byte that these have left."""

import base64
import binascii
import json
import pickle
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import traceback
from urllib.parse import quote

import pytest

from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import StageError
from nemo_minitron.security.masking import MASK
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.locks import locked
from tests.support.flow_runs import artifacts_of, in_a_flow
from tests.support.runs import minitron, settings

SECRETS = {
    "train": "trainS3cretPw",
    "validation": "validationS3cretPw",
    "source": "sourceS3cretPw",
    "mlflow": "mlflowS3cretPw",
    "query": "queryS3cretToken",
    "slurm": "slurmS3cretToken",
    "option": "optionS3cretPw",
    "HF_TOKEN": "hf_environmentS3cret",
    "WANDB_API_KEY": "wandbS3cretKey",
    "MLFLOW_TRACKING_PASSWORD": "trackingS3cretPw",
}
VARIABLES = {name: value for name, value in SECRETS.items() if name.isupper()}


def address(name, path=""):
    return f"http://me:{SECRETS[name]}@127.0.0.1:9/{path}"


def everywhere(workspace):
    """Overrides with a credential in each place that takes one."""
    return [
        f"workspace={workspace}",
        f"source.model='{address('source', 'model')}'",
        f"data.train.paths=['{address('train', 'text.jsonl')}','http://127.0.0.1:9/x?token={SECRETS['query']}']",
        f"data.validation.paths=['{address('validation', 'text.jsonl')}']",
        f"track.mlflow='{address('mlflow')}'",
        f"launch.slurm.setup=['export HF_TOKEN={SECRETS['slurm']}','login --password {SECRETS['option']}']",
    ]


def decoded(content):
    """Bytes, and what is base64 in them: Prefect stores failures so."""
    yield content
    for run in re.findall(rb"[A-Za-z0-9+/]{24,}={0,2}", content):
        try:
            yield base64.b64decode(run[: len(run) - len(run) % 4])
        except binascii.Error:
            continue


def leaks(*places, printed=""):
    """Each secret that lies in the files below some places, or was printed, as the place and its name."""
    contents = {
        path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()
    }
    contents["printed"] = printed.encode()
    found = []
    for place, content in contents.items():
        for each in decoded(content):
            for name, secret in SECRETS.items():
                if any(word.encode() in each for word in {secret, quote(secret)}):
                    found.append((str(place), name))
    return sorted(set(found))


def asked(home, question):
    with sqlite3.connect(home / "prefect.db") as database:
        return database.execute(question).fetchall()


@pytest.fixture
def run(tmp_path, prefect_home):
    """Runs 'minitron run' with an embedded server of its own that keeps all logs; returns what it printed."""
    home = shutil.copytree(prefect_home, tmp_path / "prefect")
    environment = {
        **VARIABLES, "PREFECT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "DEBUG", "MINITRON_TRACEBACK": "",
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.1",
    }  # fmt: skip

    def start(*words, code):
        done = minitron("run", *words, env=environment)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout + done.stderr

    return home, start


def test_a_run_that_fails_at_its_credentials_leaves_none_of_them(run, tmp_path):
    """The search as well: a flow within the flow, which is handed the whole configuration."""
    home, start = run
    workspace = tmp_path / "workspace"
    with locked(tmp_path / "workspace"):  # which a run of which nothing came would remove
        workspace.joinpath("kept").mkdir()
    printed = start(*everywhere(workspace), "plan.budget.params=15000", code=2)
    assert f"http://{MASK}@127.0.0.1:9/model" in printed.splitlines()[-2], printed[-2000:]
    assert leaks(home, workspace, printed=printed) == []
    stored = [
        json.loads(row[0])["config"] for row in asked(home, "select parameters from flow_run")
    ]
    assert len(stored) == 2  # compress, and search in it
    for config in stored:
        assert config["track"]["mlflow"] == f"http://{MASK}@127.0.0.1:9/"
        assert config["launch"]["slurm"]["setup"] == [
            f"export HF_TOKEN={MASK}",
            f"login --password {MASK}",
        ]
        assert config["data"]["train"]["paths"][1] == f"http://127.0.0.1:9/x?token={MASK}"
    messages = [
        row[0] for row in asked(home, "select message from flow_run_state where type = 'FAILED'")
    ]
    assert len(messages) == 2 and all(
        MASK in message and "ValueError" in message for message in messages
    )
    assert asked(home, "select count(*) from log")[0][0] > 0


def test_the_true_values_reach_the_stages_and_nothing_else(run, tmp_path, teacher, corpus):
    home, start = run
    workspace = tmp_path / "workspace"
    sound = [
        word
        for word in settings(workspace, teacher, corpus)
        if not word.startswith("data.train.paths")
    ]
    secret = [
        word for word in everywhere(workspace) if word.startswith(("data.train", "track", "launch"))
    ]
    words = [*sound, *secret, "launch.kind=subprocess", "launch.retries=0"]
    printed = start(*words, code=2)
    assert "download: " in printed and "data.train" in printed  # so far it came
    assert f"is not logged at http://{MASK}@127.0.0.1:9/" in printed
    assert leaks(home, workspace, printed=printed) == []
    assert "data.train" in (workspace / "logs" / "score.log").read_text()
    assert not (workspace / ".launch").exists()


def test_a_process_of_a_stage_masks_what_it_prints_and_hides_what_it_is_handed(tmp_path, teacher):
    from nemo_minitron.config.compose import as_dict, load_config
    from nemo_minitron.launch.launcher import Call, _write_private

    words = [*everywhere(tmp_path / "ws"), f"score.device={SECRETS['train']}"]
    config = load_config("config", words)
    call = Call("download", config, as_dict(config))
    call.workspace.launched.mkdir(parents=True)
    values = call.workspace.values("download")
    _write_private(values, call.values)
    assert stat.S_IMODE(values.stat().st_mode) == 0o600
    assert json.loads(values.read_text()) == call.values
    command = [
        sys.executable,
        "-m",
        "nemo_minitron.launch.stage_process",
        "download",
        str(values),
        str(call.outcome),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False
    )  # as a batch job: no flow reads
    assert done.returncode == 2, done.stderr
    values.unlink()
    assert leaks(tmp_path, printed=done.stdout + done.stderr) == []


def test_a_credential_in_a_deployment_is_refused_by_name(tmp_path, capsys, monkeypatch):
    from nemo_minitron.cli.main import main
    from nemo_minitron.config.compose import load_config

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    password = SECRETS["train"]
    for words, name in (
        ([f"track.mlflow={address('train')}"], f"track.mlflow=http://{MASK}@127.0.0.1:9/: "),
        ([f"launch.slurm.setup=['export A_TOKEN={password}']"], f"['export A_TOKEN={MASK}']: "),
        (
            ["--parameter", f"model={address('train')}"],
            f"--parameter model=http://{MASK}@127.0.0.1:9/: ",
        ),
        (
            ["--parameter", f'data=["{address("train")}"]'],
            f"--parameter data=http://{MASK}@127.0.0.1:9/: ",
        ),
    ):
        code, said = main(["deploy", "x", *words]), capsys.readouterr().err
        assert code == 2 and name in said and "${oc.env:NAME}" in said and password not in said, (
            said
        )
    given = [
        "track.mlflow=${oc.env:MY_MLFLOW}",
        "launch.slurm.setup=['export A_TOKEN=${oc.env:MY_TOKEN}']",
    ]
    from nemo_minitron.flows.deploy import deployment

    made = deployment(
        "x", "compress", "config", given, {"model": "http://me:${oc.env:MY_TOKEN}@h/"}, None, None
    )
    assert made.parameters["overrides"] == given
    monkeypatch.setenv("MY_MLFLOW", address("mlflow"))
    monkeypatch.setenv("MY_TOKEN", password)
    config = load_config("config", given)
    assert config.track.mlflow == address("mlflow")
    assert config.launch.slurm.setup == [f"export A_TOKEN={password}"]


def test_what_prefect_shows_cannot_be_run_again(tmp_path):
    """Without a server: the parameters are looked at before anything else."""
    from nemo_minitron.flows.compress import compress

    with pytest.raises(
        ValueError, match=r"^overrides\[1\]: 'track.mlflow=http://\*\*\*@h' holds a mask"
    ):
        compress.fn(overrides=["plan.hidden=3", f"track.mlflow=http://{MASK}@h"])
    with pytest.raises(
        ValueError, match=r"^config\.launch\.slurm\.setup\[0\]: .*\$\{oc\.env:NAME\}"
    ):
        compress.fn(config={"launch": {"slurm": {"setup": [f"export HF_TOKEN={MASK}"]}}})


HOSTILE = f"<script>a</script> | [x](http://h) `c` http://u:{SECRETS['train']}@h"
SHOWN = "&lt;script&gt;a&lt;/script&gt; \\| \\[x\\](http://h) \\`c\\` http://\\*\\*\\*@h"


def test_what_is_published_is_text_and_masked(server, played, tmp_path, monkeypatch):
    """A real server's artifacts of a stage whose every word comes from outside."""
    from nemo_minitron.evaluation.gate import GateError
    from nemo_minitron.flows import publish, tasks

    def hostile(name, config):
        folder = tmp_path / "stage"
        folder.mkdir(exist_ok=True)
        (folder / publish.LINEAGE).write_text(json.dumps({"stages": [
            {"kind": "teacher", "fingerprint": "0" * 64, "config": {"revision": HOSTILE},
             "inputs": [{"path": HOSTILE, "fingerprint": "1" * 64}]},
        ]}))  # fmt: skip
        return Result(
            name, folder, True, HOSTILE, ("task", HOSTILE), ((HOSTILE, "1"),), {}, (HOSTILE,)
        )

    monkeypatch.setattr("nemo_minitron.launch.launcher.run_alone", hostile)
    _, failure, _, _ = in_a_flow("score", workspace=tmp_path / "hostile")
    assert failure is None
    played(GateError([(HOSTILE, ">= 1", "0", "")]))
    _, failure, gated, _ = in_a_flow("evaluate", workspace=tmp_path / "hostile")
    assert isinstance(failure, GateError) and f"http://{MASK}@h" in str(failure)
    assert failure.rows[0][0] == HOSTILE.replace(f"u:{SECRETS['train']}", MASK)
    assert f"http://{MASK}@h" in gated.state.message

    found = {key: newest for key, (newest, *_) in artifacts_of("hostile").items()}
    name = "minitron-hostile"
    page = found[f"{name}-score"]
    assert (
        page.description == SHOWN
        and f"\n{SHOWN}\n" in page.data
        and f"- note: {SHOWN}" in page.data
    )
    assert json.loads(found[f"{name}-score-table"].data) == [{"task": SHOWN, SHOWN: "1"}]
    for kind in ("score", "score-table", "score-folder", "lineage", "gate"):
        artifact = found[f"{name}-{kind}"]
        text = f"{artifact.data} {artifact.description}"
        assert "<script" not in text and SECRETS["train"] not in text, text
        if kind in ("lineage", "gate"):  # cells of a table of Markdown
            assert SHOWN in text and text.count(" | ") == text.replace(SHOWN, "").count(" | ")
    assert publish.cells({"name": HOSTILE, "loss": 1.5, "failure": None}) == {
        "name": SHOWN, "loss": 1.5, "failure": None,
    }  # fmt: skip
    assert tasks.publish.line(f"a\x1b[2J\n{HOSTILE}").startswith("a\\x1b[2J <script>a</script> | ")


def test_a_failure_keeps_its_kind_and_loses_its_credentials_in_tracebacks_too(
    server, played, tmp_path
):
    from nemo_minitron.flows.masked_failures import flow

    def cause():
        try:
            raise KeyError(f"A_TOKEN={SECRETS['train']}")
        except KeyError as error:
            raise ConnectionError(f"{address('train')} is away") from error

    seen = played(cause, ValueError(f"bad: {address('train')}"))
    _, failure, run, _ = in_a_flow("download", workspace=tmp_path / "a")
    assert (
        len(seen) == run.run_count == 2 and type(failure) is ValueError
    )  # tried again, and then not
    assert (
        str(failure) == f"bad: http://{MASK}@127.0.0.1:9/"
        and SECRETS["train"] not in run.state.message
    )

    def answered():
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        request = httpx.Request(
            "GET", "http://h", headers={"authorization": f"Bearer {SECRETS['HF_TOKEN']}"}
        )
        raise HfHubHTTPError(
            f"no {address('train')}", response=httpx.Response(503, request=request)
        )

    for raised, kind in ((answered, failures.TRANSIENT), (cause, failures.TRANSIENT)):
        made = flow("withheld", lambda: "withheld")(raised)
        with pytest.raises((StageError, ConnectionError)) as caught:
            made()
        assert failures.kind_of(caught.value) == kind
        lines = "".join(traceback.format_exception(caught.value))
        assert SECRETS["train"] not in lines and MASK in lines
        assert not any(secret.encode() in pickle.dumps(caught.value) for secret in SECRETS.values())
