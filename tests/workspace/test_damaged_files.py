"""Every file of a workspace damaged in every way: one line that names it, and nothing used unseen."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.config.compose import load_config
from nemo_minitron.stages.inputs import length_notes
from nemo_minitron.stages.training_stage import last_losses
from nemo_minitron.workspace.build import make, refuse_unknown_folder
from nemo_minitron.workspace.manifest import hash_file
from nemo_minitron.workspace.results import Results
from tests.support.fuzz_workspace import READERS, cases, check, run
from tests.support.fuzzing import SEED, some, tally
from tests.support.runs import settings

TEXTS = ("train", "validation", "calibration")


@pytest.fixture(scope="module")
def overrides(teacher, corpus):
    return settings("unused", teacher, corpus)[1:]


def test_a_damaged_file_of_a_workspace_is_named_in_one_line(finished, tmp_path, overrides):
    wrong, tried = {}, 0
    for told, damage in some(cases(SEED), 30):
        tried += 1
        if problems := check(finished[0], tmp_path / "damaged", damage, overrides):
            wrong[told] = problems
    assert wrong == {}
    tally("files of a workspace", Counter({"named or read": tried}))


def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "ws", symlinks=True)


def agree(path):
    """The manifest of a file's artifact takes its bytes for the true ones."""
    manifest = path.parent / "manifest.json"
    raw = json.loads(manifest.read_text())
    for output in raw["outputs"]:
        if output["file"] == path.name:
            output.update(size=path.stat().st_size, sha256=hash_file(path))
    manifest.write_text(json.dumps(raw))


def changed(index):
    return {
        "one unit again and again": torch.zeros_like(index["hidden"]),
        "too few": index["hidden"][:5].clone(),
        "out of range": index["hidden"] + 1000,
        "descending": index["hidden"].flip(0).contiguous(),
        "other numbers": index["hidden"].float(),
        "of each layer": index["hidden"].expand(3, -1).contiguous(),
    }


@pytest.mark.parametrize(
    "how",
    ["one unit again and again", "too few", "out of range", "descending", "other numbers", "of each layer", "missing",
     "an axis of another name"],
)  # fmt: skip
def test_a_keep_file_that_was_changed_by_hand_is_never_used(finished, tmp_path, overrides, how):
    workspace = copy(finished, tmp_path)
    path = workspace / "plan" / "keep.safetensors"
    keep = load_file(path)
    if how == "missing":
        del keep["hidden"]
    elif how == "an axis of another name":
        keep["noses"] = keep["hidden"].clone()
    else:
        keep["hidden"] = changed(keep)[how]
    save_file(keep, path)
    agree(path)
    shutil.rmtree(workspace / "pruned")
    code, _, err = run("prune", f"workspace={workspace}", *overrides)
    assert code == 2 and ("keep.safetensors" in err or how == "of each layer"), err
    assert not (workspace / "pruned").exists()


@pytest.mark.parametrize("kept", [[2, 0], [0, 0], [0, 3], [0], [-1, 2], []])
def test_layers_of_a_plan_that_were_changed_by_hand_are_never_used(
    finished, tmp_path, overrides, kept
):
    workspace = copy(finished, tmp_path)
    path = workspace / "plan" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_kept": kept}))
    agree(path)
    shutil.rmtree(workspace / "pruned")
    code, _, err = run("prune", f"workspace={workspace}", *overrides)
    assert code == 2 and "plan.json: damaged: layers_" in err and "'minitron plan' again" in err


def test_a_plan_that_was_changed_in_its_size_is_noticed_by_all_who_read_it(
    finished, tmp_path, overrides
):
    workspace = copy(finished, tmp_path)
    path, place = workspace / "plan" / "plan.json", [f"workspace={workspace}"]
    before = path.read_text()
    kept = json.loads(before)["layers_kept"]
    other = next(pair for pair in ([0, 1], [0, 2], [1, 2]) if pair != kept)
    text = ",\n".join(f"    {layer}" for layer in kept)
    path.write_text(before.replace(text, ",\n".join(f"    {layer}" for layer in other), 1))
    assert path.read_text() != before and len(path.read_text()) == len(before)
    for command in (["plan", *place, *overrides], ["report", str(workspace)]):
        code, _, err = run(*command)
        assert code == 2 and f"{path}: not the file that was made" in err, err
        assert f"remove {workspace / 'plan'} and run 'minitron plan' again" in err
    shutil.rmtree(workspace / "pruned")
    without = [word for word in overrides if not word.startswith(("plan.", "source."))]
    code, _, err = run("prune", *place, *without)
    assert code == 2 and "plan.json: not the file that was made" in err
    assert not (workspace / "pruned").exists()
    shutil.rmtree(workspace / "plan")
    assert run("prune", *place, *overrides)[0] == 0


def flip(path):
    """One bit of a file's last bytes is another one: its size tells nothing."""
    text = bytearray(path.read_bytes())
    text[-10] ^= 1
    path.write_bytes(text)


def test_a_student_whose_bytes_have_changed_is_not_exported(finished, tmp_path, overrides):
    workspace = copy(finished, tmp_path)
    shutil.rmtree(workspace / "export")
    weights = workspace / "student" / "hf" / "model.safetensors"
    flip(weights)
    code, _, err = run("export", f"workspace={workspace}", *overrides)
    assert code == 2 and f"{weights}: not the file that was made" in err
    assert "minitron verify" in err and not (workspace / "export").exists()


def test_a_pretrained_teacher_whose_bytes_have_changed_is_not_pruned(tmp_path, teacher):
    workspace = tmp_path / "ws"

    def fill(folder):
        shutil.copytree(teacher, folder / "hf")

    make(workspace / "pretrain", "pretrain", {}, [], fill)
    words = [f"workspace={workspace}", "pretrain.enabled=true", "plan.ffn=20"]
    words.append("score.importance=magnitude")
    assert run("download", *words)[0] == 0
    assert run("prune", *words)[0] == 0
    shutil.rmtree(workspace / "pruned")
    weights = workspace / "pretrain" / "hf" / "model.safetensors"
    before = weights.read_bytes()
    flip(weights)
    monitored = run("prune", *words)
    assert monitored[0] == 2 and f"{weights}: not the file that was made" in monitored[2]
    weights.write_bytes(before)
    assert run("prune", *words)[0] == 0


@pytest.mark.parametrize("name", ["pruned", "student", "tokens", "logs", ".launch"])
def test_a_file_of_the_users_where_a_folder_belongs_is_refused_by_name(tmp_path, name):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / name).write_text("the user's")
    for command in ("prune", "distill", "run"):
        code, _, err = run(command, f"workspace={tmp_path / 'ws'}", "source.model=x")
        assert code == 2 and f"{tmp_path / 'ws' / name}: expected" in err and "a file" in err
    assert [path.name for path in (tmp_path / "ws").iterdir()] == [name]
    assert (tmp_path / "ws" / name).read_text() == "the user's"
    with pytest.raises(ValueError, match="found a file"):
        refuse_unknown_folder(tmp_path / "ws" / name)


def test_a_folder_of_the_users_where_a_file_belongs_is_refused_by_name(tmp_path):
    (tmp_path / "ws" / "commands.jsonl").mkdir(parents=True)
    code, _, err = run("download", f"workspace={tmp_path / 'ws'}", "source.model=x")
    assert code == 2 and "commands.jsonl: expected" in err and "a folder" in err


def test_runs_lists_a_damaged_workspace_and_goes_on_with_the_others(finished, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(finished[0], tmp_path / name, symlinks=True)
    (tmp_path / "b" / "plan" / "manifest.json").write_text('{"a":' * 50_000)
    (tmp_path / "b" / "student" / "manifest.json").write_text('{"kind": [], "schema": null}')
    code, out, _ = run("runs", str(tmp_path), "--json")
    found = {each["path"].rpartition("/")[2]: each["artifacts"] for each in json.loads(out)}
    assert code == 0 and list(found) == ["a", "b", "c"]
    assert all(each["state"] == "done" for name in "ac" for each in found[name])
    wrong = {each["name"]: each["detail"] for each in found["b"] if each["state"] == "damaged"}
    assert sorted(wrong) == ["plan", "student"]
    assert "plan/manifest.json" in wrong["plan"] and "nested deeper" in wrong["plan"]
    assert "student/manifest.json: not a manifest" in wrong["student"]
    assert "expected package, found none" in wrong["student"]
    code, out, _ = run("verify", str(tmp_path / "b"))
    assert code == 1 and out.count("not a manifest") == 2 and " 2 problems" in out


def test_the_steps_of_a_training_are_all_of_them_not_the_last_that_was_logged(finished, tmp_path):
    workspace = copy(finished, tmp_path)
    log = workspace / "student" / "metrics.jsonl"
    assert last_losses(workspace / "student").startswith("12 steps, held-out loss ")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= 9))
    told = last_losses(workspace / "student")
    assert told.startswith("12 steps, held-out loss ") and told.endswith(" at step 8")
    log.write_text("")
    assert last_losses(workspace / "student") == "12 steps"


def test_samples_longer_than_the_models_positions_are_said_so_with_both_numbers(
    tmp_path, teacher, corpus, overrides
):
    config = load_config("config", [f"data.{t}.sequence_length=65" for t in TEXTS])
    notes = length_notes(config, {"max_position_embeddings": 64}, *TEXTS)
    assert [note.split(":")[0] for note in notes] == [f"data.{t}.sequence_length" for t in TEXTS]
    assert all("65 tokens" in note and "64 positions" in note for note in notes)
    assert length_notes(config, {"max_position_embeddings": 65}, *TEXTS) == ()
    assert length_notes(config, {}, *TEXTS) == ()
    words = ["data.calibration.sequence_length=70", "data.calibration.samples=2"]
    code, _, err = run("score", f"workspace={tmp_path / 'ws'}", *overrides, *words)
    assert code == 0 and "note: data.calibration.sequence_length: 70 tokens" in err


def test_a_measurement_that_was_damaged_is_made_anew(tmp_path, capsys):
    results, key, value = Results(tmp_path), {"what": "text"}, {"loss": 1.5, "losses": [1.0, 2.0]}
    results.put(key, value)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    assert results.get(key) == value
    for text in (
        "",
        "null",
        "[]",
        "{" * 5000,
        whole.replace("1.5", "2.5"),
        '{"key": 1, "value": 2}',
    ):
        path.write_text(text)
        assert results.get(key) is None
        assert f"note: {path}: damaged; measured again" in capsys.readouterr().err
    old = {"key": key, "value": value}  # as the first version wrote it
    path.write_text(json.dumps(old))
    assert results.get(key) == value


def test_every_file_that_is_damaged_has_its_reader(finished):
    there = {path.relative_to(finished[0]).as_posix() for path in finished[0].rglob("*.json*")}
    weights = {name for name in there if "/hf/" in name or name.startswith(("pruned/", "export/"))}
    told = {"student/manifest.json", *(name for name in READERS if name in there)}
    others = {
        "scratch/metrics.jsonl", "report/manifest.json", "export/manifest.json", "pruned/manifest.json",
    }  # fmt: skip
    known = re.compile(r"results/.*|tokens/.*|rounds/.*|variants/.*")
    left = {name for name in there - weights - told - others if not known.fullmatch(name)}
    assert left == set()
