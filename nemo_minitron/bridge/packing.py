"""Samples for training and measuring: documents end to end, several texts by their weights.

The same on every machine for a given seed.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.bridge.text import TextSet, documents
from nemo_minitron.bridge.tokenizer import tokenised

_SPREAD = 8
"""How many times as much text is read as samples are taken from it in ``pack``."""


def pack(
    texts: TextSet,
    tokenizer: Any,
    length: int,
    samples: int | None,
    seed: int,
    at_most: bool = False,
    where: str | None = None,
) -> Tensor:
    """Packs documents end to end, separated by the tokenizer's own begin and end tokens, into samples.

    A sample is ``length`` tokens and the one that follows, which is the label of the last: consecutive
    samples overlap by one token, so that every token but the first is predicted once.

    Args:
        texts: what to read.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per sample.
        samples: how many to make; None: all.
        seed: order of files, and of samples.
        where: configuration section of ``samples``, for messages; None: that of the text.
        at_most: whether fewer than ``samples`` are acceptable.

    Returns:
        Tensor of shape [samples, length + 1], int64.

    Raises:
        ValueError: no text, too little for one sample, or for ``samples``.
    """
    wanted = None if samples is None else _SPREAD * samples * length + 1
    stream = _token_stream(texts, tokenizer, seed, wanted)
    total = len(stream)
    count = (total - 1) // length
    if samples is not None and count < samples and not at_most:
        raise ValueError(
            f"{where or texts.where}.samples: expected {samples} samples of {length} tokens, "
            f"the text yields {max(count, 0)}"
        )
    if count < 1:
        raise TooLittle(f"{texts.where}: the text has {total} tokens, one sample needs {length + 1}")
    packed = stream[: count * length + 1].unfold(0, length + 1, length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return packed[order[:samples]].long()


def pack_mixture(
    mixture: Sequence[tuple[TextSet, float]],
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    at_most: bool,
    where: str,
) -> Tensor:
    """Packs several texts apart, and takes samples of each by its weight; else as ``pack``.

    A text that does not fill one sample is left out.

    Args:
        mixture: text sets and their weights, shares of the samples.
        tokenizer: as there, like all others.
        length: tokens per sample.
        samples: how many to make.
        seed: order of files, and of samples.
        at_most: whether fewer are acceptable.
        where: configuration section of ``samples``.
    """
    (first, _), *more = mixture
    if not more:
        return pack(first, tokenizer, length, samples, seed, at_most, where)
    pools, weights = [], []
    for texts, weight in mixture:
        share = math.ceil(samples * weight / sum(each for _, each in mixture)) + 1
        with contextlib.suppress(TooLittle):
            pools.append(list(pack(texts, tokenizer, length, share, seed, True, where)))
            weights.append(weight)
    taken, rows = [0] * len(pools), []
    while pools and len(rows) < samples:
        source = lagging(taken, weights)
        if taken[source] == len(pools[source]):
            break
        rows.append(pools[source][taken[source]])
        taken[source] += 1
    if not rows or (len(rows) < samples and not at_most):
        raise ValueError(
            f"{where}.samples: expected {samples} samples of {length} tokens by data.train.weights, the text "
            f"yields {len(rows)}"
        )
    return torch.stack(rows)


def lagging(taken: Sequence[int], weights: Sequence[float]) -> int:
    """The text whose share lags furthest behind, from which the next sample comes.

    So any first n samples are mixed as asked.

    Args:
        taken: samples of each text so far.
        weights: shares of the texts.
    """
    count, whole = sum(taken) + 1, sum(weights)
    due = [count * weight / whole - n for weight, n in zip(weights, taken, strict=True)]
    return due.index(max(due))


class TooLittle(ValueError):
    """A text does not fill one sample."""


def _token_stream(texts: TextSet, tokenizer: Any, seed: int, wanted: int | None) -> Tensor:
    """Token ids of the documents end to end, int32, until there are as many as wanted."""
    chunks: list[Tensor] = []
    total = 0
    for ids in tokenised(documents(texts, seed), tokenizer, texts.where):
        chunks.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
        if wanted is not None and total >= wanted:
            break
    if not chunks:
        raise TooLittle(f"{texts.where}.paths: {len(texts.files)} files hold no text")
    return torch.cat(chunks)
