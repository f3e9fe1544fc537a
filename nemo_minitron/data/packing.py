"""Samples for training and measuring: documents end to end, several texts by their weights.

The same on every machine for a given seed.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.data.documents import TextSet, documents
from nemo_minitron.data.tokenizer import tokenised

_SPREAD = 8
"""How many times as much text is read as samples are taken from it in ``pack``."""


@dataclass(frozen=True)
class Packed:
    """Samples, and the documents that they are of.

    Attributes:
        samples: Tensor of shape [samples, length + 1], int64.
        documents: number of the document that stands in the middle of each sample; those of one
            document are alike, and statistics must not take them for independent.
    """

    samples: Tensor
    documents: list[int]


def pack(
    texts: TextSet,
    tokenizer: Any,
    length: int,
    samples: int | None,
    seed: int,
    at_most: bool = False,
    where: str | None = None,
) -> Packed:
    """Packs documents end to end, separated by the tokenizer's own begin and end tokens, into samples.

    A sample is ``length`` tokens and the one that follows, which is the label of the last:
    consecutive samples overlap by one token, so that every token but the first is predicted once.

    Args:
        texts: what to read.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per sample.
        samples: how many to make; None: all.
        seed: order of files, and of samples.
        where: configuration section of ``samples``, for messages; None: that of the text.
        at_most: whether fewer than ``samples`` are acceptable.

    Raises:
        ValueError: no text, too little for one sample, or for ``samples``.
    """
    wanted = None if samples is None else _SPREAD * samples * length + 1
    stream, ends = _token_stream(texts, tokenizer, seed, wanted)
    total = len(stream)
    count = (total - 1) // length
    if samples is not None and count < samples and not at_most:
        raise ValueError(
            f"{where or texts.where}.samples: expected {samples} samples of {length} tokens, "
            f"the text yields {max(count, 0)}"
        )
    if count < 1:
        raise TooLittle(
            f"{texts.where}: the text has {total} tokens, one sample needs {length + 1}"
        )
    packed = stream[: count * length + 1].unfold(0, length + 1, length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    middle = order * length + length // 2
    return Packed(packed[order].long(), torch.searchsorted(ends, middle, right=True).tolist())


def pack_mixture(
    mixture: Sequence[tuple[TextSet, float]],
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    at_most: bool,
    where: str,
) -> Packed:
    """Packs each text by itself, and takes samples of each by its weight; otherwise like ``pack``.

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
            pools.append(pack(texts, tokenizer, length, share, seed, True, where))
            weights.append(weight)
    taken, rows, documents = [0] * len(pools), [], []
    first_of = list(itertools.accumulate((max(pool.documents) + 1 for pool in pools), initial=0))
    while pools and len(rows) < samples:
        source = lagging(taken, weights)
        pool = pools[source]
        if taken[source] == len(pool.samples):
            break
        rows.append(pool.samples[taken[source]])
        documents.append(first_of[source] + pool.documents[taken[source]])
        taken[source] += 1
    if not rows or (len(rows) < samples and not at_most):
        raise ValueError(
            f"{where}.samples: expected {samples} samples of {length} tokens by data.train.weights, the text "
            f"yields {len(rows)}"
        )
    return Packed(torch.stack(rows), documents)


def lagging(taken: Sequence[int], weights: Sequence[float]) -> int:
    """The text whose share lags furthest behind; the next sample comes from it.

    So any first n samples are mixed as asked.

    Args:
        taken: samples of each text so far.
        weights: shares of the texts.
    """
    count, whole = sum(taken) + 1, sum(weights)
    due = [count * weight / whole - n for weight, n in zip(weights, taken, strict=True)]
    return due.index(max(due))


class TooLittle(ValueError):
    """A text is too short for one sample."""


def _token_stream(
    texts: TextSet, tokenizer: Any, seed: int, wanted: int | None
) -> tuple[Tensor, Tensor]:
    """Token ids of the documents end to end, int32, until there are as many as wanted; where each ends."""
    chunks: list[Tensor] = []
    total = 0
    for ids in tokenised(documents(texts, seed), tokenizer, texts.where):
        chunks.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
        if wanted is not None and total >= wanted:
            break
    if not chunks:
        raise TooLittle(f"{texts.where}.paths: {len(texts.files)} files hold no text")
    return torch.cat(chunks), torch.tensor([len(chunk) for chunk in chunks]).cumsum(0)
