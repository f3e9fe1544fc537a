"""Gemma 4: a family that keeps its layers, whose heads have two lengths, inside its multimodal model."""

import json
from pathlib import Path

import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import raw_config
from nemo_minitron.cli.main import main
from nemo_minitron.families import wrappers
from nemo_minitron.proofs.wrapper_proof import image_logits, tiny_whole
from tests.support.runs import settings


@pytest.fixture(scope="module")
def words(tmp_path_factory, tokenizer_folder, corpus):
    root = tmp_path_factory.mktemp("gemma4")
    source = root / "source"
    vocabularies = {"vocab_size": 300, "vocab_size_per_layer_input": 300}
    tiny_whole(wrappers()["gemma4"], "gemma4_text", source, **vocabularies)
    for path in tokenizer_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    own = ["plan.heads=null", "plan.layers=null", "plan.hidden=16", "plan.ffn=20"]
    return [*settings(root / "work", source, corpus), *own]


def test_width_is_cut_and_layers_are_kept(words, capsys):
    workspace = next(word for word in words if word.startswith("workspace=")).split("=", 1)[1]
    assert main(["download", *words]) == 0
    for word, told in (
        ("score.streaming=on", "score.streaming=on: no layer of gemma4_text runs without the others"),
        ("plan.layers=3", "plan.layers: family 'gemma4_text' has no prunable axis of that name"),
        ("plan.drop_layers=[1]", "plan.drop_layers: family 'gemma4_text' has no prunable axis"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(["score" if word.startswith("score") else "plan", *words, word]) == 2
        assert told in capsys.readouterr().err
        if word.startswith("score"):
            assert main(["score", *words]) == 0
    for stage in ("plan", "prune"):
        assert main([stage, *words]) == 0
    sizes = open_checkpoint(Path(workspace) / "pruned").architecture.sizes
    assert (sizes["hidden"], sizes["ffn"], sizes["layers"]) == (16, 20, 4)
    assert main(["size", f"{workspace}/pruned", "layers=3"]) == 2
    assert "gemma4_text keeps all of them" in capsys.readouterr().err


def test_the_smaller_model_reads_images(words):
    """The embedder's last layer is cut along with the hidden channels."""
    workspace = next(word for word in words if word.startswith("workspace=")).split("=", 1)[1]
    short = [*words, "trainer.max_steps=1", "evaluate.from_scratch=false", "evaluate.tasks=[]"]
    for stage in ("distill", "evaluate", "export"):
        assert main([stage, *short]) == 0
    export = Path(workspace) / "export"
    assert image_logits(export, wrappers()["gemma4"]).isfinite().all()
    written = raw_config(export)
    assert written["text_config"]["per_layer_config"] == {
        "1": {"head_dim": 8},
        "3": {"head_dim": 8},
    }
    assert "rope_scaling" not in json.dumps(written)
