"""How often a text uses each token, and what a tokenizer's chat template writes around it."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.config.config import Config
from nemo_minitron.data.calibration_samples import calibration_samples
from nemo_minitron.data.mixtures import calibration_mixture

_TAG = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_TEXT = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_ROLES = ("system", "developer", "user", "assistant", "tool")


def calibration_counts(config: Config, tokenizer: Any, rows: int) -> Tensor:
    """How often the calibration samples, those that scoring reads, use each token.

    Args:
        config: the whole configuration.
        tokenizer: a Hugging Face tokenizer.
        rows: entries of the model's vocabulary.

    Returns:
        Tensor of shape [rows], int64.

    Raises:
        ValueError: no text, or too little.
    """
    own = config.data.calibration
    samples = calibration_samples(
        calibration_mixture(config), tokenizer, own.sequence_length, own.samples, own.seed, own.packing
    )  # fmt: skip
    tokens = samples.tokens_NS if samples.valid_NS is None else samples.tokens_NS[samples.valid_NS]
    return torch.bincount(tokens.flatten(), minlength=rows)


def template_ids(tokenizer: Any) -> set[int]:
    """Tokens of what a tokenizer's chat templates write of themselves, and of the names of roles.

    The templates are read, not run: their plain text, and the texts in quotes inside of their tags.
    """
    named = tokenizer.chat_template or {}
    texts = {*_ROLES} if named else set[str]()
    for template in [named] if isinstance(named, str) else named.values():
        texts.update(_written(template))
    found = set[int]()
    for text in texts:
        found.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return found


def _written(template: str) -> Iterator[str]:
    yield from (text for text in _TAG.split(template) if text)
    for tag in _TAG.findall(template):
        for single, double in _TEXT.findall(tag):
            yield re.sub(
                r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), single or double
            )
