"""Settings of a source that are the caller's business, and stop a plain ``generate`` or ``save_pretrained``.

They are left out of what is written, and of models in memory; the files of the source stay as they are.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.config_values import tokens_beyond
from nemo_minitron.security.plain_text import plain

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
OUTPUTS = ("output_hidden_states", "output_attentions", "return_dict", "use_mtp")
"""Keys of config.json that say in which form a forward pass returns what, or how tokens are drafted."""
GENERATION = (
    "return_dict_in_generate",  # generate returns no tensor of ids
    "output_hidden_states",
    "output_attentions",
    "output_scores",
    "output_logits",
    "stop_strings",  # generate wants the tokenizer as a further argument
    "num_return_sequences",  # greedy search refuses more than one
    "use_mtp",  # generate wants prediction layers, which are not carried
)
"""Keys of generation_config.json that say so of ``generate``, or that it refuses without more arguments."""
_INPUTS = ("input_ids", "attention_mask")
"""Outputs of a tokenizer that every causal LM takes."""


def carried(name: str, content: bytes) -> bytes:
    """The bytes of a side file beside a result: the source's, unless a key is set aside."""
    left = _left_out(name, content)
    if not left:
        return content
    settings = json.loads(content)
    for key, value in left.items():
        if value is None:
            del settings[key]
        else:
            settings[key] = value
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def notes(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """What of a source is set aside, and tokens that its model does not have: file and key, one line each."""
    found = [("config.json", key, config[key]) for key in OUTPUTS if config.get(key) is _OTHER[key]]
    beyond = tokens_beyond(config, config, "config.json")
    for name in (GENERATION_CONFIG, TOKENIZER_CONFIG):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            found += [(name, key, json.loads(content)[key]) for key in _left_out(name, content)]
            if name == GENERATION_CONFIG:
                beyond += tokens_beyond(config, _settings(content), name)
    return [
        f"{name}: {key}={plain(json.dumps(value), 80)} is set aside: plain transformers code "
        "would fail with it"
        for name, key, value in found
    ] + beyond


def generation_settings(folder: Path) -> dict[str, Any] | None:
    """What is left of a generation_config.json where keys are set aside; None where it is as it should be."""
    path = folder / GENERATION_CONFIG
    content = path.read_bytes() if path.is_file() else b""
    if not _left_out(path.name, content):
        return None
    settings: dict[str, Any] = json.loads(carried(path.name, content))
    return settings


_OTHER = {
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_mtp": True,
}
"""The values of ``OUTPUTS`` that are not transformers' own defaults."""


def _left_out(name: str, content: bytes) -> dict[str, Any]:
    """Keys that are set aside, and what stands in the place of their value; None: nothing."""
    if name not in (GENERATION_CONFIG, TOKENIZER_CONFIG):
        return {}
    settings = _settings(content)
    if name == GENERATION_CONFIG:
        return dict(_of_generation(settings))
    inputs = settings.get("model_input_names")
    if isinstance(inputs, list) and not all(each in _INPUTS for each in inputs):
        return {"model_input_names": [each for each in inputs if each in _INPUTS]}
    return {}


def _settings(content: bytes) -> dict[str, Any]:
    """A file's settings; none of a file that holds none, which whoever needs them refuses."""
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _of_generation(settings: Mapping[str, Any]) -> Iterator[tuple[str, None]]:
    for key in GENERATION:
        value = settings.get(key)
        one = type(value) is int and value <= 1  # a plain generate returns one sequence anyway
        if value is not None and value is not False and not one:
            yield key, None
