"""Text from outside (names of models, tasks, files; messages) on its way to a screen, a page or a card.

What a terminal or a Markdown renderer would obey is shown instead.
"""

import json
import re

LONGEST = 4000
"""Characters of a text that is shown on one line."""
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, those that change the direction of writing, line separators, and bytes of a file name
that are no UTF-8 (which cannot be printed at all)."""
_MARKUP = re.compile(r"([\\`*\[\]|])")


def plain(text: object, longest: int = LONGEST) -> str:
    r"""A text as one line without terminal control codes.

    White space becomes single spaces, other control characters their escapes (``\x1b``); the middle
    of a very long text is left out.
    """
    line = _OBEYED.sub(_escaped, " ".join(str(text).split()))
    if len(line) <= longest:
        return line
    half = (longest - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def refuse_half_characters(content: bytes, value: object) -> None:
    """Refuses JSON with a surrogate that stands alone, which no text file or fingerprint can hold.

    Args:
        content: the JSON.
        value: what was read from it.

    Raises:
        ValueError: there is one.
    """
    if _HALF.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half of a character (a surrogate that stands alone)") from error


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def markdown(text: object) -> str:
    """A text as one line of Markdown, also in a table's cell, in which nothing is markup or HTML.

    Source: CommonMark 0.31, sections 2.4 and 2.5 (backslash escapes, entities), and GitHub's
    tables.
    """
    line = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", line)


def code(text: object) -> str:
    """A text as a code span of Markdown, whatever backticks it holds (CommonMark 0.31, section 6.1)."""
    line = plain(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    inside = f" {line} " if not line or "`" in (line[0], line[-1]) else line
    return f"{fence}{inside}{fence}"
