"""Files that store a head which config.json ties to the embedding: one model, or refused."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import SINGLE, open_checkpoint
from nemo_minitron.families import families
from nemo_minitron.proofs.tiny_models import tiny_model
from tests.support.models import logits, stream

TIED = [
    name
    for name, family in families().items()
    if any(row.when == "not tie_word_embeddings" for row in family.rows)
]


def with_head(folder, change=lambda head: head):
    tensors = load_file(folder / SINGLE)
    (embedding,) = [
        name for name in tensors if re.search(r"embed\w*\.weight", name) and "per_layer" not in name
    ]
    save_file(
        {**tensors, "lm_head.weight": change(tensors[embedding].clone())},
        folder / SINGLE,
        {"format": "pt"},
    )
    return folder


def tied_model(name, folder):
    changes = {**families()[name].proofs[0], "tie_word_embeddings": True}
    return tiny_model(families()[name], changes, folder)


@pytest.mark.parametrize("name", TIED)
def test_a_stored_head_equal_to_the_embedding_changes_nothing(tmp_path, name):
    bound = any("mamba_expand" in rule for rule in families()[name].constraints)
    keep = {} if bound else {"hidden": torch.arange(0, 32, 2)}
    plain = stream(tied_model(name, tmp_path / "m"), tmp_path / "plain", keep)
    stored = stream(with_head(tmp_path / "m"), tmp_path / "stored", keep)
    assert (stored / SINGLE).read_bytes() == (plain / SINGLE).read_bytes()
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "m").entries


def test_transformers_reads_gemma_with_a_stored_head_and_its_cut_as_tied(tmp_path):
    source = with_head(tied_model("gemma2", tmp_path / "m"))
    cut = stream(source, tmp_path / "cut", {"ffn": torch.arange(40).expand(4, -1)})
    assert torch.equal(logits(cut), logits(source))


@pytest.mark.parametrize(
    "change",
    [lambda head: head + 1e-3, lambda head: head.half(), lambda head: head[:, :16].contiguous()],
)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_another_head_under_a_tied_config_is_refused_by_name(tmp_path, name, change):
    folder = with_head(tied_model(name, tmp_path / "m"), change)
    with pytest.raises(
        ValueError,
        match=r"config.json: tie_word_embeddings says that lm_head.weight is model.embed_tokens.weight, but "
        r"model.safetensors holds another lm_head.weight; set tie_word_embeddings to false",
    ):
        open_checkpoint(folder)
