"""Memory of a training: against what autograd really keeps, and against arithmetic by hand."""

from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.families import Architecture, families
from nemo_minitron.losses.fused_linear_loss import most_cuda_bytes
from nemo_minitron.models.causal_lm import hidden_states, load_model
from nemo_minitron.training.memory_estimate import Launch, activations_per_token, training_footprint
from tests.support.models import make_model

BIG = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma", "mistral", "nemotron", "qwen3", "olmo2", "phi3", "mixtral", "qwen3_moe"],
)
def test_activations_are_near_what_autograd_keeps(tmp_path, name):
    folder = make_model(tmp_path / "m", name, **BIG)
    model = load_model(folder, dtype=torch.float32).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # its address must not be given to another
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = hidden_states(model, families()[name], torch.randint(0, 90, (2, 32)))
    hidden.sum().backward()  # else what the hooks were given, and the weights, are never freed
    measured = sum(kept.values()) / 4 / 64
    estimated = sum(activations_per_token(Architecture(families()[name], read_config(folder))))
    assert estimated == pytest.approx(measured, rel=0.34)


def test_the_rest_is_arithmetic(tmp_path):
    config = read_config(make_model(tmp_path / "m", "llama", tie_word_embeddings=False, **BIG))
    family = families()["llama"]
    model = load_model(tmp_path / "m")
    count = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    outside = count - len(model.model.layers) * layer
    one = training_footprint(
        Architecture(family, config), Launch(precision="bf16-mixed", tokens=1000)
    )
    assert (one.weights, one.gradients, one.optimizer) == (4 * count, 4 * count, 8 * count)
    assert (one.gathered, one.teacher) == (2 * count, 0)  # what autocast copies
    assert one.loss == 1000 * 96 * 2 + config["vocab_size"] * 96 * 4 + most_cuda_bytes(
        config["vocab_size"], 96
    )
    four = training_footprint(
        Architecture(family, config),
        Launch(4, True, precision="bf16-true", tokens=1000, checkpointing=True),
        Architecture(family, config),
    )
    assert four.weights == -(-count // 4) * 2
    assert four.gathered == (2 * layer + outside) * 2
    assert four.teacher == 2 * count
    assert four.activations < one.activations / 2
    assert four.total == sum(
        (four.weights * 4, four.gathered, four.teacher, four.activations, four.loss)
    )
    split = training_footprint(Architecture(family, config), Launch(4, True, 2, tokens=1000))
    assert split.weights < 4 * count / 2 + 4 * outside
    assert split.activations < one.activations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "precision: expected one of 32-true"),
        ({"ranks": 3, "tensor_parallel": 2}, "ranks: 3"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Launch(**changes)


LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON_15B = {
    "model_type": "nemotron", "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 32, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 256000, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_table_in_the_docs_is_what_comes_out():
    """docs/scale.md, row by row: student (weights, gradients, moments), gathered, teacher, activations, loss, total."""
    cases = [
        (LLAMA_8B, 3072, 9216, 8192, 8, False, False), (LLAMA_8B, 3072, 9216, 8192, 8, True, False),
        (LLAMA_8B, 3072, 9216, 8192, 8, True, True), (NEMOTRON_15B, 4096, 16384, 4096, 128, True, False),
        (NEMOTRON_15B, 4096, 16384, 4096, 128, True, True),
    ]  # fmt: skip
    rows = []
    for config, hidden, ffn, tokens, ranks, shard, teacher_shard in cases:
        family = families()[config["model_type"]]
        student = {**config, "hidden_size": hidden, "intermediate_size": ffn}
        launch = Launch(
            ranks=ranks, shard=shard, precision="bf16-mixed", tokens=tokens, checkpointing=True, teacher_shard=teacher_shard
        )  # fmt: skip
        found = training_footprint(
            Architecture(family, student), launch, Architecture(family, config)
        )
        own = found.weights + found.gradients + found.optimizer
        parts = (own, found.gathered, found.teacher, found.activations, found.loss, found.total)
        rows.append(f"{tokens} | " + " | ".join(f"{part / 2**30:.1f}" for part in parts) + " |")
    told = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    first = told.index("| Llama-3.1 8B to 4B")
    lines = told[first:].splitlines()[: len(rows)]
    assert [line.split(" |", 1)[1].strip() for line in lines] == rows
