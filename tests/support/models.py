"""Tiny models and what they compute."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

from nemo_minitron.families import families
from nemo_minitron.proofs.prediction_proof import with_predictions
from nemo_minitron.proofs.tiny_models import random_model, tiny_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
}


WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "file",
    "and",
    "writes",
    "the",
    "answer",
    "to",
    "another",
    "file",
    "while",
    "the",
    "reader",
    "waits",
    "for",
    "the",
    "next",
    "line",
    "of",
    "text",
    "because",
    "every",
    "stage",
    "leaves",
    "an",
    "artifact",
    "that",
    "names",
    "its",
    "inputs",
    "and",
    "can",
    "be",
    "checked",
    "again",
]


def make_model(folder: Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model, small enough for a test; every special token lies inside the vocabulary."""
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    return random_model({"model_type": model_type, **SIZES, **tokens, **changes}, folder, seed)


def logits(folder: Path, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a saved model, float32, after a strict load."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    tokens = torch.arange(20)[None] % model.config.vocab_size if tokens is None else tokens
    with torch.inference_mode():
        return model.eval()(tokens).logits


def stream(
    source: Path,
    target: Path,
    keep: dict[str, torch.Tensor],
    layers: tuple[int, ...] | None = None,
    experts_per_token: int | None = None,
    merge: Any = None,
) -> Path:
    """Cuts a saved model through the streaming writer."""
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint
    from nemo_minitron.pruning.slice import Cut
    from nemo_minitron.pruning.stream import write_pruned

    checkpoint = open_checkpoint(source)
    every = range(checkpoint.architecture.sizes["layers"])
    target.mkdir()
    layers = tuple(every) if layers is None else layers
    cut = Cut(checkpoint.architecture, keep, layers, experts_per_token, merge)
    write_pruned(checkpoint, [(target, cut)], 10**9)
    return target


INSTALLED = {
    name: family
    for name, family in families().items()
    if Version(transformers.__version__) >= Version(family.since)
}


def begin_texts(folder: Path, token: str = "<s>") -> int:
    """Lets the tokenizer of a folder put a token before every text, as those of Gemma and Llama do.

    Returns:
        The token's id.
    """
    rules = json.loads((folder / "tokenizer.json").read_text())
    number = next(each["id"] for each in rules["added_tokens"] if each["content"] == token)
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"id": "A", "type_id": 0}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": text}],
        "pair": [first, {"Sequence": text}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return int(number)


def predicting_model(folder: Path, tokenizer: Path) -> Path:
    """A small random GLM-4.5 with a prediction layer (MTP) behind it, and a tokenizer beside it."""
    family = families()["glm4_moe"]
    tiny_model(family, {**family.proofs[0], "vocab_size": 300}, folder / "plain")
    source = with_predictions(folder / "plain", folder / "source")
    for path in tokenizer.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    return source
