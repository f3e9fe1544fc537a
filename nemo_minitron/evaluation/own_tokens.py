"""Held-out text in the tokens of models with vocabularies of their own, and how many bytes the tokens are.

Losses per token say nothing where one model writes with longer tokens than the other: losses per byte do.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.data.tokenisation import begin_tokens

_FALLBACK = 6
"""Characters of ``<0x0A>``, which is one byte."""


def byte_lengths(tokenizer: Any, entries: int) -> Tensor:
    """Bytes of text that each token stands for, Tensor of shape [entries]; special tokens are none.

    Args:
        tokenizer: a fast tokenizer of transformers, with BPE or Unigram.
        entries: of the model's vocabulary.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    alphabet = '"type": "ByteLevel"' in json.dumps(backend["decoder"])
    added = {token["id"]: token for token in backend["added_tokens"]}
    lengths = torch.zeros(entries, dtype=torch.int64)
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            lengths[number] = 0 if added[number]["special"] else len(token.encode())
        elif alphabet:
            lengths[number] = len(token)
        elif len(token) == _FALLBACK and token.startswith("<0x") and token.endswith(">"):
            lengths[number] = 1
        else:
            lengths[number] = len(token.replace("\u2581", " ").encode())
    return lengths


def in_own_tokens(tokenizer: Any, own: Any, samples_NS: Tensor, most: int | None) -> Tensor:
    """The same texts in the tokens of another tokenizer.

    Args:
        tokenizer: that of the samples.
        own: the other.
        samples_NS: packed samples, Tensor of shape [samples, positions + 1].
        most: tokens of a sample that are kept; None: all.

    Returns:
        Tensor of shape [samples, longest]; what fills a shorter one up is negative.
    """
    begin, own_begin = (begin_tokens(each).tolist() for each in (tokenizer, own))
    rows = []
    for row in samples_NS.tolist():
        if row[: len(begin)] == begin:
            row = row[len(begin) :]
        # a character that a window cuts apart is half of one in no other tokenizer
        text = tokenizer.decode(row, clean_up_tokenization_spaces=False).strip("\ufffd")
        ids = own(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows.append([*own_begin, *ids][:most])
    longest = max(map(len, rows))
    filled = [row + [-1] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64)


def counted_bytes(samples_NS: Tensor, lengths_V: Tensor) -> tuple[list[int], list[int]]:
    """Tokens that count, and their bytes, for each sample; the first token of each is only read."""
    labels_NS = samples_NS[:, 1:]
    valid_NS = labels_NS >= 0
    bytes_NS = lengths_V[labels_NS.clamp(min=0)] * valid_NS
    return valid_NS.sum(1).tolist(), bytes_NS.sum(1).tolist()


def bits_per_byte(text: Mapping[str, Any]) -> float:
    """Bits of loss for each byte of the text."""
    return sum(_nats(text)) / math.log(2) / sum(text["bytes"])


def bits_of_samples(text: Mapping[str, Any]) -> list[float]:
    """The same of each sample."""
    return [
        nats / math.log(2) / max(1, count)
        for nats, count in zip(_nats(text), text["bytes"], strict=True)
    ]


def loss_by_teacher_token(text: Mapping[str, Any], teacher: Mapping[str, Any]) -> float:
    """Nats for as many bytes as a token of the teacher has on average: comparable with its loss."""
    each = sum(teacher["bytes"]) / sum(teacher["counts"])
    return bits_per_byte(text) * math.log(2) * each


def _nats(text: Mapping[str, Any]) -> Sequence[float]:
    return [loss * count for loss, count in zip(text["losses"], text["counts"], strict=True)]
