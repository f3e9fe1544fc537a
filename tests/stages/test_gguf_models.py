"""A GGUF file stands wherever a model's folder does, or is refused by name."""

import json
import shutil

import pytest
import torch

from nemo_minitron.cli.main import main
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.release.gguf_export import write_gguf
from tests.support.runs import settings

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher):
    """The teacher as GGUF files: with its own weights, and rounded."""
    work = tmp_path_factory.mktemp("files")
    folder = shutil.copytree(teacher, work / "m")
    made = write_gguf(folder, folder, "tiny", ["f32", "q8_0"], "gpt-2", "apache-2.0")
    return {kind: path.rename(work / path.name) for kind, path in made.items()}


@pytest.fixture(scope="module")
def words(tmp_path_factory, teacher, corpus):
    place = tmp_path_factory.mktemp("run") / "run"
    gone = ("plan.", "trainer.", "optim.", "distill.", "exp_manager.", "evaluate.")
    given = [word for word in settings(place, teacher, corpus) if not word.startswith(gone)]
    return [*given, "evaluate.speed=false", "evaluate.prompts=0"]


def test_models_that_are_measured_may_be_files(words, files, teacher, tmp_path):
    assert main(["download", *words]) == 0
    asked = [f"evaluate.model={files['f32']}", f"+evaluate.beside.small={files['q8_0']}"]
    assert main(["evaluate", *words, *asked]) == 0
    place = next(word for word in words if word.startswith("workspace=")).partition("=")[2]
    report = f"{place}/report/report.json"
    with open(report, encoding="utf-8") as file:
        models = json.load(file)["models"]
    assert models["student"]["loss"] == pytest.approx(models["teacher"]["loss"], abs=1e-5)
    assert 0 < abs(models["small"]["loss"] - models["teacher"]["loss"]) < 0.1
    again = [f"evaluate.teacher={files['q8_0']}", f"evaluate.model={teacher}"]
    assert main(["evaluate", *words, *again]) == 0
    with open(report, encoding="utf-8") as file:
        turned = json.load(file)["models"]
    assert turned["teacher"]["loss"] == models["small"]["loss"]
    assert turned["student"]["loss"] == models["teacher"]["loss"]


@pytest.mark.parametrize("key", ["evaluate.model", "evaluate.teacher", "+evaluate.beside.other"])
def test_other_files_and_damaged_ones_are_refused_by_name(words, key, tmp_path, capsys):
    assert main(["download", *words]) == 0
    capsys.readouterr()
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "m.gguf").write_text("no model")
    for name, said in (
        ("notes.txt", f"{key.lstrip('+')}: expected a folder, or a GGUF file, found a file"),
        ("m.gguf", "m.gguf: "),
        ("none.gguf", f"{key.lstrip('+')}: no such folder"),
    ):
        place = next(w for w in words if w.startswith("source.model="))
        given = [] if key == "evaluate.model" else [place.replace("source.model", "evaluate.model")]
        assert main(["evaluate", *words, *given, f"{key}={tmp_path / name}"]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1, told


def test_size_reads_a_file(files, teacher, capsys):
    found = []
    for model in (files["q8_0"], teacher):
        assert main(["size", str(model), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["parameters"] == found[1]["parameters"]


def test_what_takes_folders_alone_says_so(files, tmp_path):
    """Scripts of NeMo name folders: ``MinitronModel.from_hf`` and ``KnowledgeDistillation`` load these."""
    with pytest.raises(ValueError, match=r"tiny-F32\.gguf: a file, expected a Hugging Face folder"):
        load_model(files["f32"], torch.float32)
