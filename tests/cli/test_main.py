"""Bad input gets one clear line and exit code 2, and leaves nothing behind; the light commands stay light."""

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading

import pytest
from filelock import Timeout

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.families import architecture_of, families
from nemo_minitron.proofs.tiny_models import tiny_config
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.workspace.accelerator_lock import lock_on
from tests.support.models import make_model
from tests.support.processes import until
from tests.support.runs import minitron, refused


@pytest.fixture
def workspace(tmp_path):
    return tmp_path / "ws"


@pytest.fixture(scope="module")
def scored_once(teacher, tmp_path_factory):
    place = tmp_path_factory.mktemp("scored") / "ws"
    words = [f"workspace={place}", f"source.model={teacher}", "score.importance=magnitude"]
    assert main(["score", *words]) == 0
    return place


@pytest.fixture
def scored(scored_once, teacher, workspace):
    """A workspace that is ready to plan."""
    shutil.copytree(scored_once, workspace)
    return [f"workspace={workspace}", f"source.model={teacher}"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("plan.hiden=3", ["plan.hiden", "plan.hidden"]),
        ("sorce.model=x", ["sorce", "no such configuration key"]),
        ("trainer.max_stepz=3", ["trainer.max_stepz", "+trainer.max_stepz"]),
        ("data.calibration.smaples=3", ["data.calibration.smaples", "data.calibration.samples"]),
        ("plan.hidden=wide", ["plan.hidden", "wide"]),
        (
            "score.importance=gradient",
            ["score.importance", "activation, magnitude, random", "gradient"],
        ),
        ("plan.hidden", ["plan.hidden"]),
        ("+nonsense.key=1", ["nonsense"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_near(capsys, workspace, override, parts):
    line = refused(capsys, "plan", f"workspace={workspace}", override)
    for part in parts:
        assert part in line, line
    assert not workspace.exists()


def test_an_unknown_configuration_lists_those_that_exist(capsys):
    line = refused(capsys, "run", "--config-name", "nowhere")
    assert "nowhere" in line
    assert "demo" in line


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["plan.hidden=25"], "plan.hidden: expected 1 to 24 (the source's size), found 25"),
        (["plan.ffn=41"], "plan.ffn: expected 1 to 40"),
        (["plan.heads=4"], "plan.heads: expected a multiple of kv_heads = 3"),
        (["plan.kv_heads=1", "plan.heads=4"], "1 kv_heads can keep at most 2 heads"),
        (["plan.hidden=10"], "llama needs hidden % heads == 0, found heads=6, hidden=10"),
        ([], "no target size given"),
        (["plan.experts=2"], "plan.experts: family 'llama' has no prunable axis of that name"),
        (["plan.drop_layers=[0,7]"], "plan.drop_layers: expected different layers of 0 to 2"),
        (["plan.drop_layers=[0]", "plan.layers=2"], "give one of them, not both"),
    ],
)
def test_a_target_that_cannot_be(capsys, scored, workspace, targets, message):
    assert message in refused(capsys, "plan", *scored, *targets)
    assert not (workspace / "plan").exists()


def test_a_source_that_cannot_be(capsys, tmp_path, workspace, teacher):
    common = f"workspace={workspace}"
    assert "no such folder" in refused(capsys, "download", common, "source.model=./nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(
        capsys, "download", common, f"source.model={tmp_path / 'empty'}"
    )
    assert "no model given" in refused(capsys, "download", common)
    other = shutil.copytree(teacher, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    assert "nemotron, nemotron_h, olmo2, olmo3, olmoe, phi3, qwen2" in refused(
        capsys, "download", common, f"source.model={other}"
    )
    foreign = make_model(tmp_path / "foreign", "llama", vocab_size=200)
    shutil.copy(teacher / "tokenizer.json", foreign)
    line = refused(capsys, "download", common, f"source.model={foreign}")
    assert "the tokenizer does not fit the model" in line
    assert not (workspace / "teacher").exists()


def test_calibration_text_that_cannot_be(capsys, tmp_path, workspace, teacher, corpus):
    common = [
        f"workspace={workspace}",
        f"source.model={teacher}",
        "data.calibration.sequence_length=16",
    ]
    assert "data.train.paths: no text given" in refused(capsys, "score", *common)
    line = refused(capsys, "score", *common, f"data.calibration.paths=['{tmp_path}/none*']")
    assert "matches no file" in line
    (tmp_path / "empty.txt").write_text("\n\n")
    line = refused(capsys, "score", *common, f"data.calibration.paths=['{tmp_path}/empty.txt']")
    assert "hold no text" in line
    line = refused(
        capsys,
        "score",
        *common,
        f"data.calibration.paths=['{corpus}']",
        "data.calibration.samples=99999",
    )
    assert "expected 99999 samples of 16 tokens, the text yields" in line
    assert not (workspace / "scores").exists()
    assert not list(workspace.glob(".*partial"))


def test_a_stage_without_its_input_says_what_to_run(capsys, workspace, teacher):
    common = [f"workspace={workspace}", f"source.model={teacher}"]
    assert "run 'minitron score' first" in refused(capsys, "plan", *common, "plan.ffn=20")
    assert "run 'minitron plan' first" in refused(capsys, "prune", *common)
    assert "run 'minitron prune' first" in refused(capsys, "distill", *common)
    assert "run 'minitron evaluate' first" in refused(capsys, "report", str(workspace))


def test_a_busy_workspace(capsys, workspace, teacher):
    from nemo_minitron.workspace.locks import locked

    with locked(workspace):
        for command in ("score", "run"):
            line = refused(capsys, command, f"workspace={workspace}", f"source.model={teacher}")
            assert "another run is using it" in line


def test_a_stage_by_hand_says_what_only_a_run_heeds(capsys, tmp_path, teacher, monkeypatch):
    words = ["download", f"workspace={tmp_path}", f"source.model={teacher}"]
    own = [*words, "launch.kind=slurm", "track.mlflow=sqlite:///mlflow.db"]
    assert main(own) == 0
    lines = capsys.readouterr().err.splitlines()
    assert (
        "note: launch.kind=slurm: minitron run launches stages; this one runs in this process"
        in lines
    )
    assert "note: track.mlflow: minitron run tracks its stages; this one is not tracked" in lines
    assert main(words) == 0
    assert "note: launch" not in (said := capsys.readouterr().err) and "note: track" not in said
    monkeypatch.setenv("RANK", "1")
    from nemo_minitron.cli.main import _tell_what_is_left_to_run

    _tell_what_is_left_to_run(load_config("config", own[1:]))
    assert capsys.readouterr().err == ""


def test_a_stage_by_hand_waits_for_its_accelerator_and_holds_it(
    monkeypatch, tmp_path, workspace, teacher
):
    from nemo_minitron.stages import score

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held, ended, scores, refusals = threading.Event(), threading.Event(), score.random_scores, []
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)

    def hold():
        with lock_on("gpu-0", "flow"):
            held.set()
            until(lambda: "waiting for gpu-0" in said.getvalue(), every=0.05)
            ended.set()

    def watching(*given):
        for whose in ("flow", "stage"):
            with pytest.raises(Timeout), lock_on("gpu-0", whose):
                pass
            refusals.append(whose)
        return scores(*given)

    monkeypatch.setattr(score, "random_scores", watching)
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    words = [f"workspace={workspace}", f"source.model={teacher}", "score.importance=random"]
    assert main(["score", *words, "launch.accelerator=gpu-0"]) == 0
    assert ended.is_set() and refusals[:2] == ["flow", "stage"]
    assert "score: waiting for gpu-0, which another flow holds" in said.getvalue()
    holder.join()


def test_score_plan_prune_by_hand_and_again(capsys, scored, workspace):
    targets = ["plan.hidden=12", "plan.heads=3", "plan.ffn=20", "plan.drop_layers=[1]"]
    assert main(["plan", *scored, *targets]) == 0
    assert main(["prune", *scored, *targets]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out
    config = json.loads((workspace / "pruned" / "config.json").read_text())
    assert [
        config[k] for k in ("hidden_size", "num_attention_heads", "head_dim", "num_hidden_layers")
    ] == [
        12,
        3,
        4,
        2,
    ]
    plan = json.loads((workspace / "plan" / "plan.json").read_text())
    assert (plan["before"]["hidden"], plan["after"]["hidden"]) == (24, 12)
    assert main(["prune", *scored, *targets, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made"] is False
    assert main(["verify", str(workspace)]) == 0
    capsys.readouterr()
    weights = workspace / "pruned" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(workspace), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == 1
    assert str(weights) in problems[0]


def test_size_reads_config_json_alone(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "nemotron",
                "hidden_size": 6144,
                "intermediate_size": 24576,
                "num_hidden_layers": 32,
                "num_attention_heads": 48,
                "num_key_value_heads": 8,
                "vocab_size": 256000,
            }
        )
    )
    assert main(["size", str(tmp_path), "hidden=3072", "ffn=9216", "heads=24", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert round(facts["parameters"] / 1e9, 3) == 4.191
    assert facts["kv_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert main(["size", str(tmp_path / "config.json")]) == 0
    assert "15.629 B" in capsys.readouterr().out
    assert "expected AXIS=SIZE" in refused(capsys, "size", str(tmp_path), "width=3")
    assert "heads % kv_heads == 0" in refused(capsys, "size", str(tmp_path), "heads=47")


@pytest.mark.parametrize(
    ("model_type", "asked", "derived"),
    [
        ("qwen3_next", {"linear_key_heads": 2}, "linear_value_heads=3"),
        ("deepseek_v3", {"expert_ffn": 8}, "shared_ffn=5"),
        ("deepseek_v3", {"plain_dim": 2}, "query_dim=3"),
        ("falcon_h1", {"mamba_heads": 2}, "mamba_width=5"),
    ],
)
def test_a_size_counts_what_a_plan_with_it_keeps(capsys, tmp_path, model_type, asked, derived):
    config = tiny_config(families()[model_type], families()[model_type].proofs[0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, folder = architecture_of(config), tmp_path
    words = [f"{axis}={size}" for axis, size in asked.items()]
    assert main(["size", str(folder), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    targets = complete_targets(model.family, model.sizes, asked)
    there = model.resized(targets)
    assert told["parameters"] == model_size(there).parameters < model_size(model).parameters
    assert {axis: told[axis] for axis in there.sizes} == dict(there.sizes) != dict(model.sizes)
    axis, _, value = derived.partition("=")
    line = refused(capsys, "size", str(folder), derived)
    assert (
        f"size: {axis}: other sizes make it {model.sizes[axis]}" in line
        and f"found {value}" in line
    )


def test_families_are_listed(capsys):
    assert main(["families", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed) >= {"llama", "nemotron"}
    assert listed["llama"]["prunable"] == ["hidden", "ffn", "heads", "kv_heads", "layers"]


def test_nemo_style_overrides_reach_the_configuration(capsys):
    overrides = [
        "plan.hidden=3072",
        "trainer.devices=8",
        "+trainer.limit_val_batches=2",
        "~optim.sched",
        "optim.lr=3e-4",
    ]
    assert main(["distill", "--cfg", *overrides]) == 0
    out = capsys.readouterr().out
    assert "limit_val_batches: 2" in out
    assert "devices: 8" in out
    assert "sched" not in out.split("\noptim:")[1].split("\nexp_manager")[0]


def test_a_printed_configuration_shows_no_credential(capsys, monkeypatch):
    monkeypatch.setenv("OF_THE_DATABASE", "hunter2secret")
    assert (
        main(["run", "--cfg", "track.mlflow=http://me:${oc.env:OF_THE_DATABASE}@mlflow:5000"]) == 0
    )
    out = capsys.readouterr().out
    assert "mlflow: http://***@mlflow:5000" in out and "hunter2secret" not in out


def test_own_folder_of_configurations(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nplan: {ffn: 7}\n")
    assert (
        main(
            [
                "plan",
                "--config-dir",
                str(tmp_path),
                "--config-name",
                "mine",
                "--cfg",
                "plan.hidden=9",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "ffn: 7" in out
    assert "hidden: 9" in out
    (tmp_path / "wrong.yaml").write_text("defaults: [config, _self_]\nplan: {fnn: 7}\n")
    line = refused(capsys, "plan", "--config-dir", str(tmp_path), "--config-name", "wrong")
    assert "plan.ffn" in line


def test_help_and_light_commands_load_no_tensor_library():
    code = (
        "import sys; from nemo_minitron.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules\n"
        "assert main(['families']) == 0\n"
        "assert not {'torch', 'transformers', 'nemo', 'prefect'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout


def test_exit_codes_of_the_process(tmp_path):
    done = minitron("plan", "plan.hiden=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert minitron("size", str(tmp_path / "none")).returncode == 2
    assert minitron("--version").returncode == 0
    assert minitron("nothing").returncode == 2


def test_every_key_is_documented(capsys):
    from nemo_minitron.config.config import Config
    from nemo_minitron.config.option import describe

    for name, item, _ in describe(Config):
        assert item.metadata["help"], name
    assert main(["run", "--keys"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^distill\.temperature: .*; more than 0$", printed, re.MULTILINE)
    assert re.search(r"^distill\.divergence: .* \(one of: forward_kl, ", printed, re.MULTILINE)


@pytest.mark.parametrize("command", ["distill", "score", "plan"])
def test_several_tasks_of_srun_without_torchrun_are_refused(
    capsys, monkeypatch, workspace, scored, command
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    line = refused(capsys, command, *scored)
    assert "srun starts 2 processes that know nothing of each other" in line


def test_a_reader_that_has_enough_is_no_failure():
    command = [sys.executable, "-m", "nemo_minitron", "run", "--keys"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    process.stdout.close()  # long before anything is printed
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


def test_artifacts_of_another_model_are_not_mixed(capsys, tmp_path, scored, workspace):
    assert main(["plan", *scored, "plan.ffn=20"]) == 0
    capsys.readouterr()
    other = [
        f"workspace={workspace}",
        f"source.model={make_model(tmp_path / 'other', 'llama', seed=5, vocab_size=300)}",
    ]
    line = refused(capsys, "prune", *other, "plan.ffn=20")
    assert "made from another teacher than the one there now; run 'minitron score' again" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.calibration.sequence_length=0",
            "data.calibration.sequence_length: expected at least 1, found 0",
        ),
        ("data.calibration.samples=-1", "expected at least 1, found -1"),
        ("distill.batch_size=0", "distill.batch_size: expected at least 1"),
    ],
)
def test_a_number_out_of_range(capsys, workspace, override, message):
    assert message in refused(capsys, "score", f"workspace={workspace}", override)


def test_a_workspace_that_is_a_file_and_yaml_that_is_none(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot be used as a folder" in refused(
        capsys, "score", f"workspace={tmp_path / 'file'}"
    )
    (tmp_path / "broken.yaml").write_text("a: [1\n  b: }")
    assert "valid YAML" in refused(
        capsys, "plan", "--config-dir", str(tmp_path), "--config-name", "broken"
    )


def test_a_folder_of_the_users_where_an_artifact_belongs_is_never_overwritten(tmp_path, teacher):
    shutil.copytree(teacher, tmp_path / "teacher")
    before = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    done = minitron("download", "workspace=.", "source.model=./teacher", cwd=tmp_path)
    assert done.returncode == 2 and "was not made by this package" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()} == before
    # a model outside that happens to be called as an artifact is, is no artifact
    words = ("workspace=ws", "source.model=teacher", "score.importance=magnitude")
    for stage in ("download", "score"):
        done = minitron(stage, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
