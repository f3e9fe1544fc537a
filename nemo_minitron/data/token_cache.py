"""numpy: token ids of a text on disk: made once, grown when more are wanted, read through a memory map."""

import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import filelock
import numpy as np
import torch
from torch import Tensor

from nemo_minitron.data.document_types import Ids
from nemo_minitron.data.documents import TextSet, documents, no_text
from nemo_minitron.data.tokenisation import tokenised
from nemo_minitron.data.windows import NOTHING, begun
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.artifacts import check_file
from nemo_minitron.workspace.layout import IDS, build_lock_of, manifest_in
from nemo_minitron.workspace.manifest import Input, digest, now, write_json, write_manifest
from nemo_minitron.workspace.typed_json import read_json

PROGRESS = "progress.json"
_ITEM = np.dtype("<i4")
"""An entry of the file of ids: ~id where a token is read, but not learned."""
_SAVE_SECONDS = 10.0


def cache_key(texts: TextSet, tokenizer: Any, seed: int, answers_only: bool) -> dict[str, Any]:
    """What decides the ids; their number is not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    spoken = [rules, tokenizer.chat_template, tokenizer.eos_token_id, type(tokenizer).__name__]
    return {
        "text": texts.fingerprint,
        "tokenizer": hashlib.sha256(repr(spoken).encode()).hexdigest(),
        "seed": seed,
        "answers_only": answers_only,
    }


def cached_tokens(
    root: Path,
    texts: TextSet,
    tokenizer: Any,
    seed: int,
    wanted: int,
    answers_only: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> "np.memmap[Any, np.dtype[np.int32]]":
    """Token ids of a text set's documents end to end, at least ``wanted`` of them where there are as many.

    They lie in a folder of their own below ``root``, named by what decides them. The tokens of a
    killed run are kept and continued; a request for more tokens extends them. Two processes take
    turns.

    Args:
        root: where such folders lie.
        texts: what to read.
        tokenizer: a Hugging Face tokenizer.
        seed: order of the files.
        wanted: how many.
        answers_only: whether of a conversation only the assistant's words are learned.
        advance: called with the number of new tokens.

    Returns:
        int32 array of shape [tokens], mapped from disk.

    Raises:
        ValueError: no text.
    """
    key = cache_key(texts, tokenizer, seed, answers_only)
    folder = root / digest(key)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(build_lock_of(folder)):
        state = _state(folder)
        if not state["ended"] and state["tokens"] < wanted:
            manifest_in(folder).unlink(missing_ok=True)
            state = _grow(folder, state, texts, tokenizer, seed, wanted, answers_only, advance)
        if not manifest_in(folder).is_file():
            inputs = [Input(texts.described(), texts.fingerprint)]
            write_manifest(folder, "tokens", key, inputs, now())
    if state["tokens"] == 0:
        raise ValueError(no_text(texts))
    return np.memmap(folder / IDS, _ITEM, "r", shape=(state["tokens"],))


def _state(folder: Path) -> dict[str, Any]:
    """State of the cache: tokens on disk, documents that they are from, and whether these are all.

    ``pieces``, where it is there, is how many pieces of one more document lie there too.
    """
    known = _noted(folder / PROGRESS)
    held = (folder / IDS).stat().st_size if (folder / IDS).is_file() else 0
    if known is None or held < known["tokens"] * _ITEM.itemsize:  # somebody has shortened the file
        return {"tokens": 0, "documents": 0, "ended": False}
    return known


class _Whole(TypedDict):
    tokens: int
    documents: int
    ended: bool


class _State(_Whole, total=False):
    pieces: int


def _noted(path: Path) -> dict[str, Any] | None:
    """What a state's file says; None, with a note, where it is damaged: the text is read again."""
    if not path.is_file():
        return None
    try:
        check_file(path)
        known: dict[str, Any] = read_json(path, _State)
    except ValueError as error:
        print(f"note: {plain(error)}; for now the text is read again", file=sys.stderr)
        return None
    numbers = (known["tokens"], known["documents"], known.get("pieces", 0))
    return known if min(numbers) >= 0 else None


def _grow(
    folder: Path,
    state: dict[str, Any],
    texts: TextSet,
    tokenizer: Any,
    seed: int,
    wanted: int,
    answers_only: bool,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    tokens, done, pieces = state["tokens"], state["documents"], state.get("pieces", 0)
    advance(tokens)
    rest = itertools.islice(documents(texts, seed), done, None)
    (folder / IDS).touch()
    with (folder / IDS).open("r+b") as file:
        file.truncate(tokens * _ITEM.itemsize)  # what a killed run wrote behind its last note
        file.seek(0, os.SEEK_END)

        def note(ended: bool) -> dict[str, Any]:
            file.flush()
            os.fsync(file.fileno())
            state = {"tokens": tokens, "documents": done, "ended": ended}
            if pieces:
                state["pieces"] = pieces
            write_json(folder / PROGRESS, state)
            return state

        noted = time.monotonic()
        for ids, last in tokenised(rest, tokenizer, texts.where, answers_only, skip=pieces):
            file.write(ids.astype(_ITEM).tobytes())
            tokens += len(ids)
            done, pieces = (done + 1, 0) if last else (done, pieces + 1)
            advance(len(ids))
            if tokens >= wanted:
                return note(ended=False)
            if time.monotonic() - noted > _SAVE_SECONDS:
                note(ended=False)
                noted = time.monotonic()
        return note(ended=True)


class PackedTokens(torch.utils.data.Dataset[Tensor]):
    """Samples cut from streams of token ids that lie on disk.

    Attributes:
        streams: int32 arrays of shape [tokens].
        places_N2: stream and first token of every sample.
        positions: tokens per sample; each comes with the one that follows, the label of its last.
        begin: what each begins with (``tokenisation.begin_tokens``).
    """

    def __init__(
        self, streams: Sequence[Any], places_N2: Tensor, positions: int, begin: Ids = NOTHING
    ) -> None:
        self.streams, self.places_N2, self.positions = streams, places_N2, positions
        self.begin = begin

    def __len__(self) -> int:
        return len(self.places_N2)

    def __getitem__(self, index: int) -> Tensor:
        stream, first = self.places_N2[index].tolist()
        ids = self.streams[stream][first : first + self.positions + 1]
        return torch.from_numpy(begun(ids, self.begin).astype(np.int64))


def places(
    sizes: Sequence[int], weights: Sequence[float], positions: int, samples: int, seed: int
) -> Tensor:
    """Which samples to take: stream and first token, Tensor of shape [samples, 2].

    Of one stream each sample at most once, so that there may be fewer than asked for. Of several,
    as many as their weights say, and those of a short one again and again.

    Args:
        sizes: tokens of every stream.
        weights: share of every stream.
        positions: tokens per sample; consecutive samples of a stream overlap by one token.
        samples: how many.
        seed: seed of the order.

    Raises:
        ValueError: a stream is too short for one sample.
    """
    counts = [(size - 1) // positions for size in sizes]
    if min(counts) < 1:
        raise ValueError(f"the text has {min(sizes)} tokens, one sample needs {positions + 1}")
    if len(counts) == 1:
        first_N = _order(counts[0], seed)[:samples] * positions
        return torch.stack([torch.zeros_like(first_N), first_N], 1)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights) * samples
    allotted = shares.floor().long()
    for stream in (shares - allotted).argsort(descending=True, stable=True)[
        : samples - int(allotted.sum())
    ]:
        allotted[stream] += 1
    rows = []
    for stream, (count, due) in enumerate(zip(counts, allotted.tolist(), strict=True)):
        turns = range(-(-due // count))
        first_N = torch.cat(
            [_order(count, seed + 1_000_003 * turn) for turn in turns] or [torch.empty(0)]
        )
        first_N = first_N[:due].long() * positions
        rows.append(torch.stack([torch.full_like(first_N, stream), first_N], 1))
    return torch.cat(rows)[_order(samples, seed)]


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
