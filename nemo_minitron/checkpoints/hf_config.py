"""config.json: read, and written in the spellings of transformers 4 and 5."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.set_aside import OUTPUTS
from nemo_minitron.families import families, text_config, wrapper_of
from nemo_minitron.security.plain_text import refuse_half_characters

LARGEST, MOST_KEYS = 2**20, 2_000
"""Bytes, and keys, of a config.json; those of real models have some thousand and some fifty."""
QUANTISATION = ("quantization_config", "compression_config")
"""Keys of config.json that declare quantised weights; the second is of older compressed-tensors."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder's causal LM, whose weights are read as plain ones.

    Without what it says of quantised weights; of the text model alone, where others surround it.

    Raises:
        ValueError: see ``raw_config``; or the text model inside is not known.
    """
    config = {key: value for key, value in raw_config(folder).items() if key not in QUANTISATION}
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    alone = text_config(wrapper, config, str(folder / "config.json"))
    return {key: value for key, value in alone.items() if key not in QUANTISATION}


def raw_config(folder: Path) -> dict[str, Any]:
    """Reads config.json as it lies there.

    Raises:
        ValueError: the folder or the file is missing, or the file is no JSON object, or larger than
            any real one.
    """
    path = folder / "config.json"
    if folder.is_file():
        raise ValueError(f"{folder}: a file; expected the folder of a model, as {folder.parent}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json here; a Hugging Face model folder is expected")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path}: expected at most {LARGEST:,} bytes of settings, found {size:,}")
    try:
        content = path.read_bytes()
        config = json.loads(content.decode("utf-8"))
        refuse_half_characters(content, config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    if len(config) > MOST_KEYS:
        raise ValueError(f"{path}: expected at most {MOST_KEYS:,} keys, found {len(config):,}")
    return config


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spells out dtype, rope settings and renamed sizes for transformers 4 and 5 alike.

    transformers 5 writes ``rope_parameters`` and ``dtype``; 4.57 reads ``rope_theta``,
    ``rope_scaling``, ``partial_rotary_factor``, ``rope_local_base_freq`` (where layer types differ)
    and ``torch_dtype``, and silently falls back to defaults without them. A size with several names
    in the family's table (Qwen's ``num_experts``, which transformers 5 calls ``num_local_experts``)
    gets all of them. ``auto_map`` names code that does not come along; transformers' own classes
    are the ones that count here. What a forward pass returns beside the logits is for the caller to
    say (``checkpoints/set_aside.py``).
    """
    written = {name: value for name, value in config.items() if name not in ("auto_map", *OUTPUTS)}
    family = families().get(written.get("model_type", ""))
    for axis in family.axes.values() if family else ():
        for name in [key for key in axis.config if key in written][:1]:
            written.update({other: written[name] for other in axis.config if other not in written})
    for ours, theirs in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        if written.get(ours) is not None and written.get(theirs) is None:
            written[theirs] = written[ours]
    rope = written.get("rope_parameters")
    if isinstance(rope, Mapping) and isinstance(rope.get("sliding_attention"), Mapping):
        written.setdefault("rope_local_base_freq", rope["sliding_attention"].get("rope_theta"))
        rope = rope.get("full_attention")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        written.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            written.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        scaling = {
            k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")
        }
        if scaling.get("rope_type") in _SCALINGS:
            written.setdefault("rope_scaling", _older_scaling(scaling, written))
    return written


_SCALINGS = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""Kinds of rope scaling that transformers 4.57 knows; for later ones there is no older spelling."""
_LONGROPE = ("type", "short_factor", "long_factor")
"""The keys that Phi-3's class of 4.57 wants, and no others; the general one can do with them."""


def _older_scaling(rope: Mapping[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` as transformers 4.57 reads it.

    What longrope needs besides its factors stands at the top of config.json there.
    """
    scaling = {**rope, "type": rope.get("type", rope["rope_type"])}
    if scaling["rope_type"] != "longrope" or not set(_LONGROPE) <= set(scaling):
        return dict(rope)
    length, whole = (
        scaling.get("original_max_position_embeddings"), written.get("max_position_embeddings"),
    )  # fmt: skip
    if length is not None:
        written.setdefault("original_max_position_embeddings", length)
    derived = whole / length if isinstance(whole, int) and isinstance(length, int) and length else 0
    own_factor = scaling.get("factor") not in (None, derived)
    if own_factor or scaling.get("attention_factor") is not None:
        return dict(rope)
    return {key: scaling[key] for key in _LONGROPE}
