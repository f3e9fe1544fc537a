"""What a document is: text, text too long to be held at once, a conversation, or token ids.

A text of more than ``PIECE`` characters is read and tokenised piece by piece, so that memory does
not grow with it and time grows with its length alone. A piece ends at a place where tokenizers
start over anyway, looked for in its second half: a line break between two lines that are not blank,
else before white space, and only where there is none in the middle of a word. The tokens are then
those of the whole text for byte-level tokenizers; one that puts a mark of its own before a text
(SentencePiece) puts one before each piece, that is one more token in a million characters.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PIECE = 2**20
"""Characters of a piece at most; a text that is no longer has the tokens of the whole text."""
_AFTER_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_BEFORE_SPACE = re.compile(r"(?<=\S)\s")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class LongText:
    """A text of more than ``PIECE`` characters, read again each time it is asked for.

    Attributes:
        chunks: gives the text in parts of any size.
    """

    chunks: Callable[[], Iterator[str]]

    def pieces(self) -> Iterator[str]:
        """The text in pieces of at most ``PIECE`` characters."""
        return in_pieces(self.chunks())

    @functools.cached_property
    def length(self) -> int:
        """Characters."""
        return sum(map(len, self.chunks()))


class Conversation(list[dict[str, Any]]):
    """Messages, each with ``role`` and ``content``.

    Attributes:
        origin: file and row, for messages.
        tools: JSON schemas of the functions that the assistant may call; empty: none.
    """

    origin = ""
    tools: Sequence[dict[str, Any]] = ()


def tools_of(messages: list[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """JSON schemas of the functions that the assistant of a conversation may call."""
    return messages.tools if isinstance(messages, Conversation) else ()


Ids = np.ndarray[Any, Any]
Document = str | LongText | list[dict[str, Any]] | Ids


def text_document(chunks: Callable[[], Iterator[str]]) -> str | LongText:
    """A text as a string, where it is not too long for that.

    Args:
        chunks: gives the text in parts of any size, each time it is called.
    """
    known = list(itertools.islice(in_pieces(chunks()), 2))
    return LongText(chunks) if len(known) > 1 else "".join(known)


def pieces_of(text: str | LongText) -> Iterator[str]:
    """A text in pieces; of a short one there is one."""
    if isinstance(text, LongText):
        return text.pieces()
    return iter([text]) if len(text) <= PIECE else in_pieces([text])


def in_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Parts of any size to pieces that end where tokenizers start over."""
    buffer = ""
    for chunk in chunks:
        for start in range(0, len(chunk), PIECE):
            buffer += chunk[start : start + PIECE]
            while len(buffer) > PIECE:
                end = _safe_end(buffer)
                yield buffer[:end]
                buffer = buffer[end:]
    if buffer:
        yield buffer


def _safe_end(buffer: str) -> int:
    half = PIECE // 2
    for place, past in ((_AFTER_LINE, 1), (_BEFORE_SPACE, 0)):
        starts = [found.start() + past for found in place.finditer(buffer, half, PIECE)]
        if starts:
            return starts[-1]
    return PIECE


def cut(document: Document, share: float, end: bool) -> Document:
    """The first ``share`` of a text or of token ids, or with ``end`` what comes after it."""
    length = document.length if isinstance(document, LongText) else len(document)
    place = int(length * share)
    if not isinstance(document, LongText):
        return document[place:] if end else document[:place]

    def chunks() -> Iterator[str]:
        at = 0
        for chunk in document.chunks():
            yield chunk[max(0, place - at) :] if end else chunk[: max(0, place - at)]
            at += len(chunk)
            if at >= place and not end:
                return

    return text_document(chunks)


def blank(document: Document) -> bool:
    """Whether a document holds nothing."""
    if isinstance(document, LongText):
        return not any(chunk.strip() for chunk in document.chunks())
    return not document.strip() if isinstance(document, str) else len(document) == 0


def draw_of(document: Document) -> int:
    """A number below 2 ** 64 drawn from a document's content; copies have the same."""
    hashed = hashlib.sha256()
    if isinstance(document, np.ndarray):
        for start in range(0, len(document), PIECE):
            hashed.update(document[start : start + PIECE].astype("<i8").tobytes())
    else:
        texts = [_told(document)] if isinstance(document, list) else _chunks(document)
        for text in texts:
            hashed.update(text.encode("utf-8", "replace"))
    return int.from_bytes(hashed.digest()[:8], "big")


def _told(talk: list[dict[str, Any]]) -> str:
    """A conversation as JSON; what is no JSON (a time, bytes) as Python shows it, but for its address."""
    tools = list(tools_of(talk))
    said = [talk, tools] if tools else talk
    return json.dumps(said, default=lambda value: _ADDRESS.sub("", repr(value)))


def _chunks(text: str | LongText) -> Iterator[str]:
    return text.chunks() if isinstance(text, LongText) else iter([text])
