"""Values in a config.json that no model can have, or that readers understand as two different models."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.families import families
from nemo_minitron.security.plain_text import plain

_DTYPES = ("dtype", "torch_dtype")
_DROPOUT = ("dropout", "pdrop")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_values(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses what would fail, or be another model for another reader, long after the file was read.

    Raises:
        ValueError: a pad token without an embedding, a dtype or a probability that is none, or one
            setting under two names with two values; the message names file and key.
    """
    for words in (*_tokens(config), *_dtypes(config), *_dropouts(config), *_doubles(config)):
        raise ValueError(f"{folder / 'config.json'}: {words}")


def _tokens(config: Mapping[str, Any]) -> Iterator[str]:
    pad, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    if type(pad) is int and type(vocabulary) is int and pad >= vocabulary > 0:
        yield (
            f"pad_token_id={pad} lies beyond vocab_size={vocabulary}, so that no "
            "embedding can be made; set it to a token of the vocabulary, or to null"
        )


def _dtypes(config: Mapping[str, Any]) -> Iterator[str]:
    for key in _DTYPES:
        name = config.get(key)
        known = isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)
        if name is not None and not known and not isinstance(name, Mapping):
            yield f"{key}: expected a dtype such as bfloat16, found {plain(name, 40)!r}"


def _dropouts(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key.endswith(_DROPOUT) and isinstance(value, int | float) and not 0 <= value < 1:
            yield f"{plain(key, 80)}: expected at least 0 and less than 1, found {value!r:.40}"


def _doubles(config: Mapping[str, Any]) -> Iterator[str]:
    """Transformers 5 and 4.57 each read a spelling of their own."""
    rope = config.get("rope_parameters")
    inner = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    outer = config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        yield (
            f"rope_theta={plain(outer, 40)}, and rope_theta={plain(inner, 40)} in rope_parameters: "
            "transformers 5 reads the second, older versions the first; remove the wrong one"
        )
    family = families().get(str(config.get("model_type")))
    for axis in family.axes.values() if family else ():
        if axis.size is not None:  # its keys are no names of the size itself
            continue
        found = {key: config[key] for key in axis.config if config.get(key) is not None}
        if any(value != next(iter(found.values())) for value in found.values()):
            named = ", ".join(f"{key}={plain(value, 40)}" for key, value in found.items())
            yield f"one size under several names ({named}); remove the wrong ones"


def tokens_beyond(config: Mapping[str, Any], settings: Mapping[str, Any], file: str) -> list[str]:
    """What of a model's special tokens the model can neither read nor write: file and key, one line each.

    Args:
        config: its config.json.
        settings: where the tokens are named: the same, or generation_config.json.
        file: what an entry calls that file.
    """
    vocabulary = config.get("vocab_size")
    found = []
    for key in _TOKENS:
        value = settings.get(key)
        for token in value if isinstance(value, list) else [value]:
            if type(token) is int and type(vocabulary) is int and token >= vocabulary > 0:
                found.append(
                    f"{file}: {key}={token} lies beyond vocab_size={vocabulary}: the model can neither read "
                    "nor write it"
                )
    return found
