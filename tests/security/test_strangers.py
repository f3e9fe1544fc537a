"""Folders and files of strangers: what they name, link to and list reaches nothing of the user's."""

import json
import os
import shutil
import subprocess

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.side_files import side_files
from nemo_minitron.cli.main import main
from nemo_minitron.data.documents import documents, find_text
from nemo_minitron.flows.evaluate_checkpoint import teacher_of
from nemo_minitron.models.causal_lm import load_model, load_tokenizer
from nemo_minitron.workspace.build import refuse_unknown_folder
from nemo_minitron.workspace.locks import locked
from nemo_minitron.workspace.manifest import Output, read_manifest, write_json, write_manifest


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "notes.txt").write_text("of the user's")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "report/.report.html.tmp",
        "..holder.json.tmp",
        "logs/evaluate.log",
        "tokens/abc/tokens.bin",
        "commands.jsonl",
    ],
)
def test_nothing_is_written_through_a_workspaces_links(tmp_path, capsys, home, name):
    workspace = tmp_path / "run"
    (workspace / name).parent.mkdir(parents=True, exist_ok=True)
    (workspace / name).symlink_to(home / "notes.txt")
    for words in (["plan"], ["report"]):
        place = [f"workspace={workspace}"] if words == ["plan"] else [str(workspace)]
        assert main([*words, *place]) == 2
        assert (
            f"{workspace / name}: a link to {home / 'notes.txt'}, outside of"
            in capsys.readouterr().err
        )
    assert (home / "notes.txt").read_text() == "of the user's"


def test_a_workspace_with_links_to_folders_and_with_pipes_is_refused(tmp_path, home):
    workspace = tmp_path / "run"
    workspace.mkdir()
    (workspace / "student").symlink_to(home)
    with pytest.raises(ValueError, match="student: a link to"), locked(workspace):
        pass
    (workspace / "student").unlink()
    os.mkfifo(workspace / "commands.jsonl")
    with pytest.raises(ValueError, match="neither a file nor a folder"), locked(workspace):
        pass
    (workspace / "commands.jsonl").unlink()
    (workspace / "plan").mkdir()
    (workspace / "logs").symlink_to("plan")
    # what is the user's stays the user's: workspace=. in a project has a virtual environment and links to data
    (workspace / ".venv" / "bin").mkdir(parents=True)
    (workspace / ".venv" / "bin" / "python").symlink_to(home / "notes.txt")
    (workspace / "data").symlink_to(home)
    os.mkfifo(workspace / "pipe")
    with locked(workspace):
        pass


@pytest.mark.parametrize("place", ["variants/thin", "rounds/100/thin"])
def test_a_variant_shares_what_lies_in_its_sweep_and_nothing_else(tmp_path, home, place):
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    variant = tmp_path / "run" / place
    variant.mkdir(parents=True)
    (variant / "teacher").symlink_to(os.path.relpath(tmp_path / "run" / "teacher", variant))
    with locked(variant):
        pass
    (variant / "scores").symlink_to(home)
    with pytest.raises(ValueError, match="scores: a link to"), locked(variant):
        pass


@pytest.mark.parametrize("name", ["../../home/notes.txt", "/etc/hostname", "a/../../x"])
def test_a_manifest_lists_files_of_its_own_folder_only(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")
    manifest = write_manifest(tmp_path / "a", "plan", {}, [], "2026")
    listed = Output(name, 0, manifest.outputs[0].sha256)
    found = json.loads((tmp_path / "a" / "manifest.json").read_text())
    write_json(tmp_path / "a" / "manifest.json", {**found, "outputs": [vars(listed)]})
    with pytest.raises(ValueError, match="lies outside of the folder"):
        read_manifest(tmp_path / "a")


def test_a_folder_of_the_users_is_not_taken_for_a_training(tmp_path):
    """One that has a sub-folder state, as ~/.local does."""
    (tmp_path / "student" / "state" / "app").mkdir(parents=True)
    (tmp_path / "student" / "share").mkdir()
    with pytest.raises(ValueError, match="was not made by this package"):
        refuse_unknown_folder(tmp_path / "student")


def test_a_data_files_name_is_no_address(tmp_path, monkeypatch):
    """fsspec reads '::' as a chain of protocols, and one of them renders templates."""
    mark = tmp_path / "PWNED"
    template = f"{{{{ cycler.__init__.__globals__.os.mkdir('{mark}') }}}}"
    (tmp_path / "refs.txt").write_text(
        json.dumps(
            {
                "version": 1,
                "gen": [{"key": template, "url": "x", "dimensions": {"i": [1]}}],
                "refs": {},
            }
        )
    )
    (tmp_path / "reference::refs.txt").write_text("text")
    (tmp_path / "fine.txt").write_text("more text")
    monkeypatch.chdir(tmp_path)
    for paths in (["."], ["*.txt"], ["reference::refs.txt"]):
        with pytest.raises(ValueError, match=r"'reference::refs.txt'.*is not read"):
            find_text(paths, [], "auto", "text", "data.train")
    texts = find_text(["fine.txt"], [], "auto", "text", "data.train")
    assert list(documents(texts)) == ["more text"]
    assert not mark.exists()


def test_a_saved_data_set_consists_of_its_own_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "data")
    texts = find_text([str(tmp_path / "data")], [], "auto", "text", "data.train")
    assert sorted(documents(texts)) == ["one", "two"]
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    (tmp_path / "data" / state["_data_files"][0]["filename"]).rename(tmp_path / "secret.arrow")
    write_json(
        tmp_path / "data" / "state.json",
        {**state, "_data_files": [{"filename": "../secret.arrow"}]},
    )
    with pytest.raises(ValueError, match=r"names '\.\./secret\.arrow', which is no file beside it"):
        list(documents(find_text([str(tmp_path / "data")], [], "auto", "text", "data.train")))


@pytest.mark.parametrize("name", ["vocab.txt", "additional_chat_templates/a.jinja", "spiece.model"])
def test_no_file_beside_a_model_is_a_link_out_of_its_folder(teacher, tmp_path, home, name):
    folder = shutil.copytree(teacher, tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(home / "notes.txt")
    for read in (open_checkpoint, load_model, load_tokenizer):
        with pytest.raises(ValueError, match="a link to"):
            read(folder)


def test_weights_are_those_that_were_checked(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "transformers_weights": "other.safetensors"})
    for read in (open_checkpoint, load_model):
        with pytest.raises(ValueError, match="transformers_weights names other files"):
            read(folder)
    write_json(folder / "config.json", config)
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    names = {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})
    with pytest.raises(ValueError, match=r"two sets of weights.*remove one"):
        open_checkpoint(folder)


def test_terms_of_use_are_no_code(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "model")
    for name in (
        "LICENSE",
        "LICENSE-2.0",
        "USE_POLICY.md",
        "evil_POLICY.py",
        "POLICY.pkl",
        "LICENSE.bin",
    ):
        (folder / name).write_text("terms")
    found = {path.name for path in side_files(folder)}
    assert {"LICENSE", "LICENSE-2.0", "USE_POLICY.md"} <= found
    assert not found & {"evil_POLICY.py", "POLICY.pkl", "LICENSE.bin"}


def test_an_exports_lineage_does_not_read_the_environment(tmp_path):
    entry = {
        "kind": "teacher",
        "config": {"revision": None},
        "inputs": [{"path": "o/${oc.env:HOME}", "fingerprint": "f", "finished": None}],
        "fingerprint": "f",
    }
    write_json(tmp_path / "minitron.json", {"stages": [entry]})
    with pytest.raises(ValueError, match="no folder and no hub id"):
        teacher_of(tmp_path)
    judged = {**entry, "kind": "report", "config": {}}
    for path in ("o/${oc.env:HOME}", "org/model"):  # not looked for on the hub
        judged["inputs"] = [{"path": path, "fingerprint": "f", "finished": None}]
        write_json(tmp_path / "minitron.json", {"stages": [entry, judged]})
        with pytest.raises(ValueError, match="no folder here; give it"):
            teacher_of(tmp_path)


def test_a_training_removes_no_folder_that_a_checkpoint_names(tmp_path, teacher, home):
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from nemo_minitron.training.checkpoint_safety import keep_checkpoints_inside

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    callback = ModelCheckpoint(dirpath=folder, monitor="loss")
    trainer = Trainer(
        callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu"
    )
    keep_checkpoints_inside(trainer, folder)
    own, other = str(folder / "step=1.ckpt"), str(folder / ".." / "home" / "docs")
    state = {
        "best_model_score": None,
        "best_k_models": {own: torch.tensor(1.0), other: torch.tensor(2.0)},
    }
    state |= {"best_model_path": own, "kth_best_model_path": other, "last_model_path": other}
    callback.load_state_dict(state)
    assert list(callback.best_k_models) == [own]
    assert (callback.best_model_path, callback.kth_best_model_path, callback.last_model_path) == (
        own,
        "",
        "",
    )


def test_git_is_not_asked_about_the_folder_that_a_training_runs_in(tmp_path, teacher, monkeypatch):
    """It would run what the repository's configuration says."""
    from tests.support.nemo_training import run

    repository = tmp_path / "repository"
    repository.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    (repository / "file").write_text("one")
    subprocess.run(["git", "add", "file"], cwd=repository, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=repository, check=True)
    script = tmp_path / "monitor"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/PWNED\n")
    script.chmod(0o755)
    subprocess.run(["git", "config", "core.fsmonitor", str(script)], cwd=repository, check=True)
    monkeypatch.chdir(repository)
    run(teacher, tmp_path / "state", 1)
    assert not (tmp_path / "PWNED").exists()
    subprocess.run(["git", "diff"], cwd=repository, check=False, capture_output=True)
    assert (tmp_path / "PWNED").exists()  # it would have been
