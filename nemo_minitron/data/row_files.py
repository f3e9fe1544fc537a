"""Rows of JSON, parquet and data sets on the hub, and the document that each holds.

JSON is read by a reader of its own: values one after another (JSON Lines), or the elements of one
array, a megabyte at a time. A value that is damaged, too long or too deep is refused by its number,
before it reaches code that a stranger's file could bring down. Rows are as they are written: no key
is added to them. The other formats are read by ``datasets``.
"""

import codecs
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from nemo_minitron.data.compressed_files import CHUNK, opened
from nemo_minitron.data.document_types import Conversation
from nemo_minitron.security.plain_text import plain

LONGEST_ROW = 2**27
"""Characters of a row at most."""
DEEPEST_ROW = 100
"""Lists and objects inside each other at most."""
_NAMES = ("messages", "conversations")
"""The usual columns of conversations."""
_TOOLS = "tools"
"""The column of the functions that a conversation's assistant may call, as of transformers' templates."""
_TOGETHER = 32
"""Rows of a parquet file in memory at a time."""
_STRONG = 50
"""A file that holds more than this many times its bytes is read a row at a time; text: 5 to 10 times."""
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{\]}]')
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")
_UNENDED = 16
"""An error so close to the end of what was read may be no more than that: more is read."""


def document_of(row: Any, text_key: str, place: str) -> str | Conversation:
    """Text, or the messages of a conversation with its tools, from the columns that hold them.

    Args:
        row: column to value.
        text_key: column of the text.
        place: configuration section, file and row, for messages.

    Raises:
        ValueError: neither is there, or tools that are none.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, found {_type(row)}")
    found = row.get(text_key)
    if found is None and text_key == "text":
        found = next((row[key] for key in _NAMES if row.get(key)), None)
    if isinstance(found, str) and len(found) <= LONGEST_ROW:
        return found
    if isinstance(found, str):
        raise ValueError(f"{place}: longer than {LONGEST_ROW:,} characters")
    if (
        isinstance(found, list)
        and found
        and all(isinstance(m, dict) and "role" in m for m in found)
    ):
        talk = Conversation(_message(message, place) for message in found)
        talk.origin, talk.tools = place, _tools(row.get(_TOOLS), place)
        return talk
    under = f"{_type(found)} there" if text_key in row else f"{plain(sorted(row), 200)}"
    raise ValueError(
        f"{place}: expected text, or messages with role and content, under {text_key!r}, found {under}"
    )


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    """A message whose content is text, or nothing; parts that are all text are put together."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return {**message, "content": "".join(part["text"] for part in content)}
    parts = content if isinstance(content, list) else []
    other = next(
        (part["type"] for part in parts if _has_type(part) and part["type"] != "text"), None
    )
    what = _type(content) if other is None else f"a part of type {plain(other, 60)!r}"
    raise ValueError(
        f"{place}: the content of a message must be text or parts of type 'text', found {what}; "
        "leave such rows out of the data"
    )


def _tools(found: Any, place: str) -> list[dict[str, Any]]:
    """The tools of a row: JSON schemas, as a list or as JSON of one; none of what is empty."""
    if found in (None, "", []):
        return []
    try:
        listed = _parsed(found)
        tools = [_parsed(tool) for tool in listed] if isinstance(listed, list) else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {_TOOLS!r}: {_reason(error, 'text')}") from error
    wrong = next((tool for tool in tools if not isinstance(tool, dict)), None)
    if not isinstance(listed, list) or wrong is not None:
        what = _type(listed) if not isinstance(listed, list) else f"{_type(wrong)} in the list"
        raise ValueError(
            f"{place}: expected a list of JSON schemas, or its JSON, under {_TOOLS!r}, found {what}; leave "
            "that column out of the data if it holds something else"
        )
    return tools


def _parsed(value: Any) -> Any:
    """What a text holds as JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    _check(value)
    return json.loads(value)


def _has_type(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _type(value: Any) -> str:
    names = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
    }
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else type(value).__name__
    )


def json_rows(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """Place (for messages) and value of every row of a JSON file; one in an array may be text itself.

    Raises:
        ValueError: the file is damaged, a row is no JSON, or exceeds a limit.
    """
    number = 0
    with opened(path, where) as file:
        try:
            for number, value in enumerate(_values(_decoded(file)), 1):
                yield f"{where}: {plain(path)}, row {number}", value
        except (ValueError, RecursionError) as error:
            place = f"{where}: {plain(path)}, row {number + 1}"
            raise ValueError(f"{place}: {_reason(error)}") from error


def _reason(error: Exception, what: str = "row") -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (character {error.pos + 1} of the {what})"
    if isinstance(error, UnicodeDecodeError):
        return "the file is not UTF-8 from here on"
    if isinstance(error, RecursionError):
        return f"nested more than {DEEPEST_ROW} deep"
    return plain(error, 200)


def _decoded(file: IO[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while raw := file.read(CHUNK):
        yield decoder.decode(raw)
    yield decoder.decode(b"", final=True)


def _values(chunks: Iterator[str]) -> Iterator[Any]:
    """The values of a text, one after another; those of an array if the text is one."""
    reader = _Reader(chunks)
    if reader.next_mark() != "[":
        while reader.next_mark():
            yield reader.value()
        return
    reader.at += 1
    while (mark := reader.next_mark()) != "]":
        if not mark:
            raise json.JSONDecodeError("the array does not end", "", 0)
        value = reader.value()
        yield {"text": value} if isinstance(value, str) else value
        if reader.next_mark() == ",":
            reader.at += 1
    reader.at += 1
    if reader.next_mark():
        raise json.JSONDecodeError("something follows the array", "", 0)


class _Reader:
    """Values of JSON in a text that comes in parts.

    Attributes:
        at: place of the next character in what has been read and not dropped yet.
    """

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks, self._buffer, self.at = chunks, "", 0

    def _more(self) -> bool:
        """Reads at least as much again as is waiting, so that no row is read over and over."""
        parts, size = [self._buffer[self.at :]], 0
        for part in self._chunks:
            parts.append(part)
            size += len(part)
            if size > len(parts[0]):
                break
        self._buffer, self.at = "".join(parts), 0
        return size > 0

    def next_mark(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            found = _SPACE.match(self._buffer, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self._buffer):
                return self._buffer[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The value that begins at ``at``.

        Raises:
            ValueError: it is no JSON, or exceeds a limit.
        """
        while True:
            start, size = self.at, len(self._buffer)
            try:
                value, end = _DECODER.raw_decode(self._buffer, start)
            except json.JSONDecodeError as error:
                unended = error.msg.startswith("Unterminated") or error.pos >= size - _UNENDED
                if unended and size - start <= LONGEST_ROW and self._more():
                    continue
                if size - start > LONGEST_ROW:
                    raise ValueError(f"longer than {LONGEST_ROW:,} characters") from error
                raise json.JSONDecodeError(error.msg, "", error.pos - start) from None
            if end == size and isinstance(value, int | float) and self._more():
                continue  # a number may go on
            _check(self._buffer[start:end])
            self.at = end
            return value


def _check(row: str) -> None:
    """Refuses a row that is too long, too deep, or that holds half a character.

    Raises:
        ValueError: it is.
    """
    if len(row) > LONGEST_ROW:
        raise ValueError(f"longer than {LONGEST_ROW:,} characters")
    if row.count("[") + row.count("{") > DEEPEST_ROW and _depth(row) > DEEPEST_ROW:
        raise ValueError(f"nested more than {DEEPEST_ROW} deep")
    if _HALVES.search(row):
        try:
            json.dumps(json.loads(row), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            text = "one half of a surrogate pair (\\ud800 to \\udfff) stands alone"
            raise ValueError(text) from None


def _depth(row: str) -> int:
    depth = deepest = 0
    for found in _MARKS.finditer(row):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest


def rows_of(rows: Iterable[Any], name: object, where: str) -> Iterator[tuple[str, Any]]:
    """Place (for messages) and value of every row that ``datasets`` gives; rows are counted from 1."""
    for number, row in enumerate(rows, 1):
        yield f"{where}: {plain(name)}, row {number}", row


def parquet_rows(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """Place and value of every row of a parquet file; none of an empty file.

    Raises:
        ValueError: the file is damaged.
    """
    import datasets
    import pyarrow.parquet

    datasets.disable_progress_bars()

    def rows() -> Iterator[Any]:
        if path.suffix.lower() == ".parquet":
            if path.stat().st_size == 0:
                return
            with pyarrow.parquet.ParquetFile(path) as file:
                if file.metadata.num_rows == 0:
                    return
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                # datasets would make a copy of a long value for each of the rows that share it
                if sum(group.total_byte_size for group in groups) > _STRONG * path.stat().st_size:
                    for batch in file.iter_batches(batch_size=1):
                        yield from batch.to_pylist()
                    return
        options = {"split": "train", "streaming": True, "batch_size": _TOGETHER}
        # datasets takes a name for a pattern, and would read a1.parquet for a[1].parquet
        name = glob.escape(os.path.abspath(path))
        yield from datasets.load_dataset("parquet", data_files=[name], **options)

    yield from guarded(rows(), path, where, "parquet")


def guarded(rows: Iterator[Any], path: Path, where: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Rows of a stranger's file, whose reader may raise anything.

    Raises:
        ValueError: it did, with the file's name and the row.
    """
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            cause = error.__cause__ or error
            raise ValueError(
                f"{where}: {plain(path)} cannot be read as {kind} after row {number}: "
                f"{plain(cause, 200) or type(cause).__name__}"
            ) from error
        if row is None:
            return
        number += 1
        yield f"{where}: {plain(path)}, row {number}", row
