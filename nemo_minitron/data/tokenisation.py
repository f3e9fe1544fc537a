"""tokenizers: documents to token ids, in pieces of bounded size.

Texts are encoded by as many threads as there are cores, up to ``_TOGETHER`` of them and
``_CHARACTERS`` characters at a time: a tokenizer takes some 200 bytes of memory per character while
it encodes. A long text comes in pieces (``document_types``); only the first gets the tokens that the
tokenizer puts before a text, and only the last those that it puts after it.
"""

import bisect
import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from nemo_minitron.data.chat_template import ChatTemplate
from nemo_minitron.data.document_types import PIECE, Document, Ids, LongText, in_pieces, pieces_of

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
_TOGETHER = {"text": 256, "conversation": 64}
"""How many are read at a time: the process that renders conversations goes on while they are encoded."""
_CHARACTERS = 2 * PIECE


class Tokens(NamedTuple):
    """Consecutive token ids of one document.

    Attributes:
        ids: int32 array; ~id where a token is read, but not learned.
        last: whether the document ends with them.
    """

    ids: Ids
    last: bool


class _Part(NamedTuple):
    text: str
    first: bool
    last: bool


def tokenised(
    found: Iterator[Document],
    tokenizer: Any,
    where: str,
    answers_only: bool = False,
    skip: int = 0,
) -> Iterator[Tokens]:
    """Token ids of documents, each ended by the tokenizer's end token; conversations by its chat template.

    Args:
        found: documents.
        tokenizer: a Hugging Face tokenizer.
        where: configuration section, for messages.
        answers_only: whether the tokens of a conversation that no assistant said come as ~id, which
            is negative: they are read, and not learned.
        skip: pieces of the first document to leave out.

    Raises:
        ValueError: a conversation without a template, or one that its template cannot render within
            its limits; ids beyond the vocabulary.
        RuntimeError: the process for the template does not start.
    """
    with contextlib.closing(ChatTemplate(tokenizer, where)) as template:
        for kind, run in itertools.groupby(found, _kind):
            if kind == "text":
                yield from _texts(run, tokenizer, skip)
            elif kind == "ids":
                yield from itertools.islice(_ids(run, tokenizer, where), skip, None)
            else:
                talks = _conversations(run, tokenizer, template, where, answers_only)
                yield from itertools.islice(talks, skip, None)
            skip = 0


def _kind(document: Document) -> str:
    if isinstance(document, np.ndarray):
        return "ids"
    return "text" if isinstance(document, str | LongText) else "conversation"


def _texts(run: Iterable[Any], tokenizer: Any, skip: int) -> Iterator[Tokens]:
    parts = itertools.chain.from_iterable(map(_parts, run))
    for together in _batches(itertools.islice(parts, skip, None)):
        whole = [part.text for part in together if part.first and part.last]
        cut = [part.text for part in together if not (part.first and part.last)]
        ids_whole = iter(_encoded(whole, tokenizer))
        ids_cut = iter(_encoded(cut, tokenizer, add_special_tokens=False))
        for part in together:
            if part.first and part.last:
                yield _ended(next(ids_whole), tokenizer)
                continue
            before, after = _around(tokenizer)
            ids = (before if part.first else []) + next(ids_cut) + (after if part.last else [])
            yield _ended(ids, tokenizer) if part.last else _tokens(ids, False)


def _parts(document: str | LongText) -> Iterator[_Part]:
    pieces = pieces_of(document)
    first, text = True, next(pieces, "")
    for following in pieces:
        yield _Part(text, first, False)
        first, text = False, following
    yield _Part(text, first, True)


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if len(batch) == _TOGETHER["text"] or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(texts: list[str], tokenizer: Any, **options: Any) -> list[list[int]]:
    found: list[list[int]] = (
        tokenizer(texts, verbose=False, **options)["input_ids"] if texts else []
    )
    return found


def begin_tokens(tokenizer: Any) -> Ids:
    """What a tokenizer puts before every text, most often its beginning-of-sequence token; int32."""
    return np.asarray(_around(tokenizer)[0], np.int32)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text."""
    (bare,) = _encoded(["a"], tokenizer, add_special_tokens=False)
    (dressed,) = _encoded(["a"], tokenizer)
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start], dressed[start + len(bare) :]
    return [], []


def _ids(run: Iterable[Any], tokenizer: Any, where: str) -> Iterator[Tokens]:
    largest = max(tokenizer.get_vocab().values())
    for document in run:
        for start in range(0, len(document), PIECE):
            ids = document[start : start + PIECE]
            if ids.max() > largest or ids.min() < 0:
                raise ValueError(
                    f"{where}: token ids up to {int(ids.max())} do not fit the tokenizer, whose largest "
                    f"is {largest}: the data set was made with another one"
                )
            last = start + PIECE >= len(document)
            yield _ended(ids.tolist(), tokenizer) if last else _tokens(ids, False)


def _conversations(
    run: Iterable[Any], tokenizer: Any, template: ChatTemplate, where: str, answers_only: bool
) -> Iterator[Tokens]:
    run = iter(run)
    while together := list(itertools.islice(run, _TOGETHER["conversation"])):
        if not tokenizer.chat_template:
            raise ValueError(
                f"{where}: the text holds conversations, but the tokenizer has no chat template"
            )
        for text, answers in template.render(together, answers_only):
            yield from _conversation(text, answers, tokenizer, answers_only)


def _conversation(
    text: str, answers: list[tuple[int, int]], tokenizer: Any, answers_only: bool
) -> Iterator[Tokens]:
    at = 0
    begins = [begin for begin, _ in answers]

    def learned(start: int, end: int) -> bool:
        answer = bisect.bisect_right(begins, start) - 1
        return answer >= 0 and end <= answers[answer][1]

    for piece in in_pieces([text]) if text else [""]:
        options = {"add_special_tokens": False, "verbose": False}
        encoded = tokenizer(piece, return_offsets_mapping=answers_only, **options)
        ids = encoded["input_ids"]
        if answers_only:
            spans = encoded["offset_mapping"]
            marks = [learned(at + start, at + end) for start, end in spans]
            ids = [i if yes else ~i for i, yes in zip(ids, marks, strict=True)]
        at += len(piece)
        yield _ended(ids, tokenizer) if at == len(text) else _tokens(ids, False)


def _ended(ids: list[int], tokenizer: Any) -> Tokens:
    end = tokenizer.eos_token_id
    if end is None or (ids and ids[-1] in (end, ~end)):
        return _tokens(ids, True)
    return _tokens([*ids, end], True)


def _tokens(ids: Any, last: bool) -> Tokens:
    return Tokens(np.asarray(ids, np.int32), last)
