"""From documents to samples: the one way for scoring, measuring and training.

Documents are laid end to end, each ended by the tokenizer's end token, and this stream of tokens is
cut into windows. A window is ``length`` tokens and the one that follows, which is the label of the
last: consecutive windows overlap by one token, so that every token but the first is predicted once.
What is left at the end, less than a window, is dropped.

Where a tokenizer puts a token before every text (``<bos>`` of Gemma, Llama and others), a window
begins with it, in the place of the token that was there, as in llama.cpp's perplexity: models that
were trained so may read a text without it far worse, and are never asked to in use. That place is no
label, so that still every token but the first is predicted once.

What reads the windows differs in their order alone, because it differs in what may be in memory:

- measuring (``pack``) reads 8 times as much text as it needs and takes windows from all of it;
- scoring (``calibration_samples``) draws from one pool of windows after the other, so that the n
  samples of a small draw are the first n of any larger one;
- training (``token_cache``) keeps the stream on disk and computes where its windows begin.

Several texts are mixed by their weights, one rule for measuring and scoring (``mixed``); training
allots its windows beforehand, because it may read a short text several times.

The price: every token is read once and copied twice; time and memory are linear in what is read, and
reading stops as soon as there is enough, also inside of a document.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.data.document_types import Ids
from nemo_minitron.data.documents import TextSet, documents, no_text
from nemo_minitron.data.tokenisation import Tokens, begin_tokens, tokenised

SPREAD = 8
"""How many times as much text is read as is needed, so that samples are not of its beginning alone."""


NOTHING: Ids = np.empty(0, np.int32)


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of the stream.

    Attributes:
        ids: token ids, int32, ``length`` + 1 of them; fewer where documents are not packed.
        positions: place of each token in its document, as far as it lies in the window.
        document: number of the document that stands in the middle.
    """

    ids: Ids
    positions: Ids
    document: int


def windows(stream: Iterable[Tokens], length: int, begin: Ids = NOTHING) -> Iterator[Window]:
    """Cuts a stream of documents into windows.

    Args:
        stream: token ids of documents, in pieces.
        length: tokens per window, besides the label of the last.
        begin: what each begins with (``tokenisation.begin_tokens``).
    """
    waiting: list[tuple[Ids, Ids, Ids]] = []
    count = place = number = 0
    for ids, last in stream:
        places = np.arange(place, place + len(ids), dtype=np.int32)
        waiting.append((ids, places, np.full(len(ids), number, np.int32)))
        count, place = count + len(ids), place + len(ids)
        if last:
            place, number = 0, number + 1
        if count > length:
            joined, places, owners = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
            used = (count - 1) // length * length
            for start in range(0, used, length):
                cut = slice(start, start + length + 1)
                middle = int(owners[start + length // 2])
                yield Window(begun(joined[cut], begin), _in_window(places[cut]), middle)
            waiting, count = [(joined[used:], places[used:], owners[used:])], count - used


def begun(ids: Ids, begin: Ids) -> Ids:
    """A window whose first tokens are ``begin``; one label at least stays."""
    count = min(len(begin), len(ids) - 1)
    return np.concatenate([begin[:count], ids[count:]]) if count else ids


def _in_window(places: Ids) -> Ids:
    """Positions that begin with 0 also for the document that began before the window."""
    first = places[0]
    if first == 0:
        return places
    begin = next(iter(np.flatnonzero(places == 0)), len(places))
    return np.concatenate([places[:begin] - first, places[begin:]])


def beginnings(stream: Iterable[Tokens], length: int, begin: Ids = NOTHING) -> Iterator[Window]:
    """The first ``length`` + 1 tokens of each document, those of a single token left out.

    A document of token ids, which no tokenizer has read here, gets ``begin`` in front.
    """
    ids: list[Ids] = []
    number = 0
    for tokens in stream:
        ids.append(tokens.ids[: length + 1 - sum(map(len, ids))])
        if tokens.last:
            joined = np.concatenate(ids)
            if not np.array_equal(joined[: len(begin)], begin):
                joined = np.concatenate([begin, joined])[: length + 1]
            if len(joined) > 1:
                yield Window(joined, np.arange(len(joined)), number)
            ids, number = [], number + 1


def mixed(
    streams: Sequence[Iterator[Window]], weights: Sequence[float]
) -> Iterator[tuple[int, Window]]:
    """Windows of several texts, until the one whose turn it is has no more, with the number of their text.

    The next window comes from the text whose share lags furthest behind, so that any first n
    windows are mixed as asked.

    Args:
        streams: windows of every text.
        weights: share of every text.
    """
    taken, whole = [0] * len(streams), sum(weights)
    while streams:
        count = sum(taken) + 1
        due = [count * weight / whole - n for weight, n in zip(weights, taken, strict=True)]
        text = due.index(max(due))
        window = next(streams[text], None)
        if window is None:
            return
        taken[text] += 1
        yield text, window


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
    """Samples for measuring, from all of the text that is read.

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
    found, total = _all_windows(texts, tokenizer, length, samples, seed)
    count = len(found)
    if samples is not None and count < samples and not at_most:
        raise ValueError(
            f"{where or texts.where}.samples: expected {samples} samples of {length} tokens, "
            f"the text yields {count}"
        )
    if count < 1:
        raise TooLittle(
            f"{texts.where}: the text has {total} tokens, one sample needs {length + 1}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return _packed([found[number] for number in order])


def _all_windows(
    texts: TextSet, tokenizer: Any, length: int, samples: int | None, seed: int
) -> tuple[list[Window], int]:
    """The windows of the text, until there is enough of it; and how many tokens were read."""
    total, wanted = 0, math.inf if samples is None else SPREAD * samples * length + 1

    def enough() -> Iterator[Tokens]:
        nonlocal total
        for tokens in tokenised(documents(texts, seed), tokenizer, texts.where):
            total += len(tokens.ids)
            yield tokens
            if total >= wanted:
                return

    found = list(windows(enough(), length, begin_tokens(tokenizer)))
    if not total:
        raise TooLittle(no_text(texts))
    return found, total


def _packed(found: Sequence[Window]) -> Packed:
    ids = np.stack([window.ids for window in found])
    return Packed(torch.from_numpy(ids).long(), [window.document for window in found])


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
    first_of = list(itertools.accumulate((max(pool.documents) + 1 for pool in pools), initial=0))
    streams = [_numbered(pool, number) for pool, number in zip(pools, first_of, strict=False)]
    found = [window for _, window in itertools.islice(mixed(streams, weights), samples)]
    if not found or (len(found) < samples and not at_most):
        raise ValueError(
            f"{where}.samples: expected {samples} samples of {length} tokens by data.train.weights, the text "
            f"yields {len(found)}"
        )
    return _packed(found)


def _numbered(pool: Packed, first: int) -> Iterator[Window]:
    for ids, document in zip(pool.samples.numpy(), pool.documents, strict=True):
        yield Window(ids, np.empty(0), first + document)


class TooLittle(ValueError):
    """A text is too short for one sample."""
