"""A training is resumed from data: a checkpoint that would run code is refused."""

import io
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_minitron.cli.main import main
from nemo_minitron.training.checkpoint_safety import DataReader, checkpoints_as_data
from tests.support.nemo_training import killed_behind_a_checkpoint
from tests.support.runs import prune


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def killed(tmp_path, words_often):
    """A workspace whose distillation was killed behind its first checkpoint."""
    words = [*words_often, "trainer.max_steps=60", "trainer.enable_progress_bar=false"]
    place = tmp_path / "run"
    prune(place, *words)
    return place, words, killed_behind_a_checkpoint(place, *words)


def test_a_checkpoint_with_code_in_it_is_refused_and_an_honest_one_resumes(
    killed, tmp_path, capsys, monkeypatch
):
    place, words, checkpoint = killed
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what some NeMo users have set
    honest = tmp_path / "honest.ckpt"
    shutil.copy(checkpoint, honest)
    content = torch.load(checkpoint, weights_only=False)
    torch.save({**content, "note": Bomb(tmp_path / "PWNED")}, checkpoint)
    capsys.readouterr()
    assert main(["distill", f"workspace={place}", *words]) == 2
    said = capsys.readouterr().err
    assert f"{checkpoint}: holds more than the data of a training" in said
    assert "remove it to start over" in said
    assert not (tmp_path / "PWNED").exists()
    shutil.copy(honest, checkpoint)
    assert main(["distill", f"workspace={place}", *words]) == 0
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def saved(state, folder):
    # one after the other: else torch asks whatever accelerator there is for a stream, also a test's own
    dcp.save(
        state, storage_writer=dcp.FileSystemWriter(folder, per_thread_copy_ahead=0), no_dist=True
    )


def test_a_checkpoint_in_parts_with_code_in_it_is_refused(tmp_path):
    state = {"weight": torch.arange(4.0), "step": 3, "betas": (0.9, 0.95)}
    saved(dict(state), tmp_path / "c")
    found = {"weight": torch.zeros(4), "step": 0, "betas": (0.0, 0.0)}
    with checkpoints_as_data(tmp_path / "c"):
        dcp.load(found, storage_reader=DataReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(found["weight"], state["weight"])
    assert (found["step"], found["betas"]) == (3, (0.9, 0.95))
    metadata = tmp_path / "c" / ".metadata"
    honest = metadata.read_bytes()
    for bomb in (
        Bomb(tmp_path / "PWNED"),
        os.system,
        getattr,
        torch.load,
        torch.hub.load,
        dcp.load,
    ):
        metadata.write_bytes(pickle.dumps([pickle.loads(honest), bomb]))
        with (
            pytest.raises(ValueError, match="holds more than the data of a training"),
            checkpoints_as_data(tmp_path / "c"),
        ):
            dcp.load(found, storage_reader=DataReader(tmp_path / "c"), no_dist=True)
    assert not (tmp_path / "PWNED").exists()


def test_code_in_what_is_no_tensor_is_refused(tmp_path):
    saved({"step": Bomb(tmp_path / "PWNED")}, tmp_path / "c")
    with pytest.raises(ValueError, match="holds more than"), checkpoints_as_data(tmp_path / "c"):
        dcp.load({"step": 0}, storage_reader=DataReader(tmp_path / "c"), no_dist=True)
    buffer = io.BytesIO()
    torch.save(Bomb(tmp_path / "PWNED"), buffer)
    with pytest.raises(ValueError, match="holds more than"), checkpoints_as_data(None):
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert not (tmp_path / "PWNED").exists()
