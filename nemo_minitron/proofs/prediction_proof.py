"""What a family's table says of multi-token prediction layers (MTP), tried in transformers' own module.

The module runs such layers of any family; a configuration that does not count them, or names no kinds
for them, is told so, and a class that looks for them under one published model's number, under which.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import SINGLE, Checkpoint, open_checkpoint
from nemo_minitron.families import layers_behind
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.tiny_models import permutation
from nemo_minitron.pruning.select import Keep
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.slice_predictions import CutPredictions
from nemo_minitron.pruning.slice_wrapper import write_causal_lm
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.scoring.magnitude import magnitudes

COUNT = 1
"""Prediction layers of the tiny models: as many as published models have."""


def runs_predictions() -> bool:
    """Whether the installed transformers has a module that runs prediction layers."""
    try:
        from transformers.modeling_layers import MtpModel  # noqa: F401
    except ImportError:
        return False
    return True


def with_predictions(source: Path, folder: Path, seed: int = 5) -> Path:
    """A copy of a tiny model with random prediction layers behind it."""
    checkpoint = open_checkpoint(source)
    model, generator = checkpoint.architecture, torch.Generator().manual_seed(seed)
    behind = layers_behind(model, COUNT)
    tensors = load_file(source / SINGLE)
    for inner, _, shape in behind.architecture.tensors():
        scale = 1.0 if len(shape) == 1 else 0.3
        name = behind.stored_name(inner, model.sizes["layers"])
        tensors[name] = torch.randn(shape, generator=generator) * scale
    folder.mkdir()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    counted = {key: COUNT for key in checkpoint.family.mtp_layers[:1]}
    (folder / "config.json").write_text(json.dumps({**config, **counted}), encoding="utf-8")
    return folder


def write_both(
    checkpoint: Checkpoint,
    keep: Keep,
    layers: Sequence[int],
    folder: Path,
    own: Keep | None = None,
) -> Path:
    """Cuts a model together with its prediction layers; ``own`` as for ``CutPredictions``."""
    cut = Cut(checkpoint.architecture, keep, tuple(layers))
    behind = CutPredictions(checkpoint, cut, magnitudes, own)
    with tempfile.TemporaryDirectory() as name:
        write_pruned(checkpoint, [(Path(name), cut)], 10**9)
        trunk = open_checkpoint(Path(name))
        folder.mkdir()
        write_causal_lm(trunk, folder, lambda _: torch.float32, 10**9, behind)
        config = {**trunk.config, **behind.config}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def reordered(checkpoint: Checkpoint, folder: Path) -> Path:
    """The same model with all units in another order, those of its prediction layers too."""
    model = checkpoint.architecture
    axes = [axis for axis in model.prunable if axis != "layers"]
    alone = layers_behind(model, COUNT).architecture
    of_layers = [a for a in alone.prunable if a != "layers" and alone.family.ranked_per(a)]
    keep = permutation(model, axes)
    own = {a: units for a, units in permutation(alone, of_layers, 2).items() if a in of_layers}
    return write_both(checkpoint, keep, range(model.sizes["layers"]), folder, own)


def drafting(folder: Path) -> Any:
    """A saved model that finds its prediction layers."""
    model = load_model(folder, torch.float32)
    checkpoint = open_checkpoint(folder)
    beginnings = {name.partition(".layers.")[0] for name in checkpoint.predictions}
    layers = checkpoint.architecture.sizes["layers"]
    names = [re.escape(f"model.layers.{layers + i}.") for i in range(COUNT)]
    model._keys_to_ignore_on_load_unexpected = names if beginnings == {"model"} else ["^mtp"]
    model.config.num_mtp_layers = COUNT
    if getattr(model.config, "layer_types", None) is not None:
        model.config.mtp_layer_types = ["full_attention"] * COUNT
    return model


def drafted(folder: Path) -> Tensor:
    """Logits of a saved model's prediction layers for the next token but one, shape [1, 1, vocabulary]."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    model = drafting(folder)
    tokens = torch.arange(2, 12)[None] % model.config.vocab_size
    with torch.inference_mode():
        layers = MtpModel.from_pretrained(model, trust_remote_code=False)
        read = model.get_decoder()(tokens[:, :-1], use_cache=False).last_hidden_state
        place = torch.arange(1, tokens.shape[1])[None]
        cache = MtpCache(config=model.config.get_mtp_config())
        _, logits, _ = layers.eval()(tokens[:, 1:], read, None, place, cache)
    found: Tensor = logits
    return found


def drafts_truly(folder: Path, length: int = 8) -> bool:
    """Whether generation with drafted tokens writes what plain greedy generation writes."""
    model = drafting(folder)
    tokens = torch.arange(2, 8)[None] % model.config.vocab_size
    write = partial(
        model.generate, tokens, max_new_tokens=length, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    with torch.inference_mode():
        return torch.equal(write(), write(use_mtp=True))
