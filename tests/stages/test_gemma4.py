"""Gemma 4: a family that keeps its layers, whose heads have two lengths, inside its multimodal model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import raw_config
from nemo_minitron.cli.main import main
from nemo_minitron.families import Architecture, families, wrappers
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.tiny_models import tiny_config
from nemo_minitron.proofs.wrapper_proof import image_logits, tiny_whole
from nemo_minitron.pruning.slice import Cut
from tests.support.runs import settings


@pytest.fixture(scope="module")
def words(tmp_path_factory, tokenizer_folder, corpus):
    root = tmp_path_factory.mktemp("gemma4")
    source = root / "source"
    vocabularies = {"vocab_size": 300, "vocab_size_per_layer_input": 300}
    tiny_whole(wrappers()["gemma4"], "gemma4_text", source, **vocabularies)
    config = json.loads((source / "config.json").read_text())
    beyond = [
        k for k, v in config.items() if k.endswith(("_token_id", "_token_index")) and v and v >= 300
    ]
    config |= {
        key: 200 + place for place, key in enumerate(beyond)
    }  # as published: in the vocabulary
    (source / "config.json").write_text(json.dumps(config))
    for path in tokenizer_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    own = ["plan.heads=null", "plan.layers=null", "plan.hidden=16", "plan.ffn=20"]
    return [*settings(root / "work", source, corpus), *own]


def test_width_is_cut_and_layers_are_kept(words, capsys):
    workspace = next(word for word in words if word.startswith("workspace=")).split("=", 1)[1]
    assert main(["download", *words]) == 0
    for word, told in (
        ("score.streaming=on", "score.streaming=on: no layer of gemma4_text runs without the others"),
        ("score.depth=lm_loss", "score.depth=lm_loss: leaves layers out, and a layer of gemma4_text may read"),
        ("score.depth=task", "score.depth=task: leaves layers out"),
        ("score.tasks=[] plan.layer_choice=greedy plan.layers=3", "plan.layer_choice=greedy: leaves layers out"),
        ("plan.layers=3", "plan.layers: family 'gemma4_text' has no prunable axis of that name"),
        ("plan.drop_layers=[1]", "plan.drop_layers: family 'gemma4_text' has no prunable axis"),
    ):  # fmt: skip
        capsys.readouterr()
        stage = "score" if word.startswith("score") else "plan"
        assert main([stage, *words, *word.split()]) == 2
        assert told in capsys.readouterr().err
        if word.startswith("score"):
            assert main(["score", *words]) == 0
    for stage in ("plan", "prune"):
        assert main([stage, *words]) == 0
    sizes = open_checkpoint(Path(workspace) / "pruned").architecture.sizes
    assert (sizes["hidden"], sizes["ffn"], sizes["layers"]) == (16, 20, 4)
    assert main(["size", f"{workspace}/pruned", "layers=3"]) == 2
    assert "gemma4_text keeps all of them" in capsys.readouterr().err


def test_the_vocabulary_goes_from_both_tables_of_embeddings(words, tmp_path):
    """Embeddings per layer go by the same ids: what is kept computes what it did."""
    place = tmp_path / "run"
    asked = ("workspace=", "plan.", "evaluate.", "trainer.", "optim.", "distill.", "exp_manager.")
    given = [word for word in words if not word.startswith(asked)]
    for stage in ("download", "plan", "prune"):
        assert main([stage, f"workspace={place}", *given, "plan.vocab=280"]) == 0
    source = next(word for word in words if word.startswith("source.model=")).split("=", 1)[1]
    kept_V = load_file(place / "plan" / "keep.safetensors")["vocab"]
    small = open_checkpoint(place / "pruned")
    assert len(kept_V) == small.architecture.sizes["vocab"] == 280
    assert small.config["vocab_size_per_layer_input"] == 280
    before, after = (
        load_file(f"{source}/model.safetensors"),
        load_file(place / "pruned/model.safetensors"),
    )
    for name in ("embed_tokens", "embed_tokens_per_layer"):
        whole = before[f"model.language_model.{name}.weight"]
        assert torch.equal(after[f"model.{name}.weight"], whole[kept_V])
    tokens = torch.arange(24).reshape(2, 12) * 11
    with torch.inference_mode():
        want = load_model(Path(source), torch.float32)(kept_V[tokens]).logits[..., kept_V]
        found = load_model(place / "pruned", torch.float32)(tokens).logits
    assert torch.allclose(want, found, atol=1e-5 * want.abs().max())


def test_a_model_without_embeddings_per_layer_keeps_their_number():
    family = families()["gemma4_text"]
    config = tiny_config(family, {**family.proofs[1], "vocab_size_per_layer_input": 50})
    cut = Cut(Architecture(family, config), {"vocab": torch.arange(64)}, (0, 1, 2, 3))
    assert (cut.after["vocab"], cut.after["layer_vocab"]) == (64, 50)


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
