"""transformers: a causal LM of weights that are read here: its folder does not hold them as plain ones.

One rule for quantised checkpoints and GGUF files: a model in memory is made of the tensors that
scoring and pruning stream (``checkpoints/tensor_rows.py``). So every stage sees the same numbers,
and transformers needs neither a format's own package nor an accelerator.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.set_aside import GENERATION_CONFIG
from nemo_minitron.families import find_row
from nemo_minitron.models.config_trial import config_object


def load_read_here(
    folder: Path,
    dtype: torch.dtype | str,
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A causal LM, and what transformers tells of its loading.

    Args:
        folder: the model.
        dtype: of its weights; ``auto`` is that of config.json.
        settings: entries that replace those of its config.json; ``generation_config``, where there
            is one, replaces that of the folder.
        weights: weights in the place of those on disk, by the names on disk.

    Raises:
        ValueError: see ``open_checkpoint``.
    """
    checkpoint = open_checkpoint(folder)
    given = {key: value for key, value in settings.items() if key != "generation_config"}
    config = config_object({**both_spellings(checkpoint.config), **given})
    generation = settings.get("generation_config")
    if generation is None and (folder / GENERATION_CONFIG).is_file():
        stored = json.loads((folder / GENERATION_CONFIG).read_text(encoding="utf-8"))
        generation = transformers.GenerationConfig.from_dict(stored)
    tensors = dict(weights or {}) or {
        name: load_tensor(checkpoint, name)
        for name in checkpoint.entries
        if find_row(checkpoint.family, name) is not None
    }
    architecture = getattr(transformers, checkpoint.family.architecture)
    model, info = architecture.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    if generation is not None:
        model.generation_config = generation
    return model, info
