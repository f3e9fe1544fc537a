"""Masks credentials in text for a screen, a file or a database.

What counts as one: tokens of a known shape, names and passwords in addresses, secret parts of
queries, what is assigned to a name that says so, ``Authorization`` headers; and, wherever they
stand, the values of this process' environment variables with such names and what ``remember``
noted. A reference such as ``$HF_TOKEN`` or ``${oc.env:HF_TOKEN}`` is none.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
_SHORTEST = 8
"""Characters of a secret that is looked for wherever it stands: shorter ones may be words."""
_KINDS = (
    r"token|api[_\-]?key|secret|(?:secret|access|private|account)[_\-]?key|password|passwd|passphrase"
    r"|auth[_\-]?string"
)
_NAMED = re.compile(rf"(?:{_KINDS})$", re.IGNORECASE)
_NAMED_OTHERWISE = re.compile(
    r"(?:^|[_.\-])(?:bos|eos|pad|unk|sep|cls|mask|special|start|end|stop|char|str|image|audio|video|per|each"
    r"|next|last|first|new|max|num)[_\-]?token$",
    re.IGNORECASE,
)
"""A tokenizer's tokens, and counts of tokens."""
_ASSIGNED = re.compile(
    rf"(?<![\w.\-])(?P<name>[\w.\-]*?(?:{_KINDS}))(?P<between>['\"\\]*[ \t]*(?:=(?!=)|:)[ \t]*)",
    re.IGNORECASE,
)
_OPTION = re.compile(
    rf"(?<![\w.\-])(?P<name>--?[\w\-]*?(?:{_KINDS}))(?P<between>['\"]*[ \t]+)(?!-)", re.IGNORECASE
)
_VALUE = re.compile(
    r"(?P<quote>['\"\\]{1,8})(?P<inside>.*?)(?P=quote)"
    r"|['\"]?[^\s'\"]+(?:['\"](?=[^\s'\",;)\]}])[^\s'\"]+)*"  # as in it's
)
_COUNT = re.compile(rf"[\d.,:%]{{1,{_SHORTEST - 1}}}(?![^\s'\"])")
"""A number that is short enough to be one of tokens; a credential may be of digits alone."""
_HEADER = re.compile(
    r"(authorization['\"]?[ \t]*[:=][ \t]*b?['\"]?(?:\w+[ \t]+)?)([^\s'\",]+)", re.IGNORECASE
)
_BEARER = re.compile(r"\b(Bearer[ \t]+)([A-Za-z0-9._~+/=\-]{16,})")
_QUERY = re.compile(
    rf"([?&;](?:[\w.\-]*?(?:{_KINDS})|sig|signature|x-(?:amz|goog)-(?:signature|credential)|key|auth|jwt|pwd"
    r"|awsaccesskeyid)=)([^&#\s'\"<>]+)",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"(?P<scheme>://)(?:"
    r"[^/?#\s'\"<>]*"
    # a password that ought to be percent-encoded; a short number there is a port
    r"|[^/?#\s'\"<>:@]+:(?!\d{1,5}(?:[/?#]|$))[^\s'\"<>@]{0,500}(?:@[^/?#\s'\"<>]*(?=@))?"
    # what is left of an address that was taken for a path
    r")@|(?P<path>:/)[^/\s'\"<>:@]+:[^\s'\"<>]{0,500}@"
)
_SHAPES = re.compile(
    r"(?P<hub>hf_)(?!transfer\b)[A-Za-z0-9]{8,}"
    r"|(?<![A-Za-z0-9])(?:gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}|pn[bu]_[A-Za-z0-9]{20,}"
    r"|xox[abeprs]-[\w\-]{10,}|sk-[A-Za-z0-9_\-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|dapi[0-9a-f]{32}"
    r"|AIza[\w\-]{35}|npm_[A-Za-z0-9]{36}|api_org_[A-Za-z0-9]{20,}"
    r"|eyJ[\w\-]{10,}\.[\w\-]+\.[\w\-]*)"
)
_REFERENCE = re.compile(r"['\"\\]*(?:\$\{[^}]*\}|\$\([^)]*\)?|\$[A-Z_][A-Z0-9_]*)\W*")
_REFERRED = re.compile(r"(?:(?:[^:$]*|\$\{[^}]*\}):)?\$\{[^}]*\}")
"""Name and password of an address, or the password alone, by reference."""
_NOTHING = frozenset({"", "none", "null", "true", "false"})
_MASKED = re.compile(r"hf_\*\*\*|:/\*\*\*@|://\*\*\*@|(?<![^\s'\"=:])\*\*\*(?![^\s'\"&,;)\]}])")

_remembered: set[str] = set()


def names_secret(name: str) -> bool:
    """Whether a name says that its value is a secret, as ``HF_TOKEN`` and ``db.password`` do."""
    return _NAMED.search(name) is not None and _NAMED_OTHERWISE.search(name) is None


def masked(text: str) -> str:
    """A text without credentials; one that is masked already stays as it is."""
    return _without(text, _ignore)


def masked_values(value: Any, name: str = "") -> Any:
    """The same for all texts in dictionaries, lists and tuples; what a key calls a secret goes as a whole."""
    if isinstance(value, str):
        whole = names_secret(name) and not _is_harmless(value)
        return MASK if whole else masked(value)
    if isinstance(value, Mapping):
        return {
            masked(key) if isinstance(key, str) else key: masked_values(
                item, key if isinstance(key, str) else ""
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [masked_values(item, name) for item in value]
    if isinstance(value, tuple):
        return tuple(masked_values(item, name) for item in value)
    return value


def remember(value: Any) -> None:
    """Takes note of the credentials in a configuration, to mask them wherever they turn up in this process.

    A library that took an address apart tells its parts, without what showed that they are a name
    and a password.
    """
    if isinstance(value, str):
        _without(value, _note)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if (
                isinstance(item, str)
                and isinstance(key, str)
                and names_secret(key)
                and not _is_harmless(item)
            ):
                _note(item)
            remember(item)
    elif isinstance(value, list | tuple):
        for item in value:
            remember(item)


def mask_in(value: Any, where: str = "") -> tuple[str, str] | None:
    """The first text in a value that holds a mask, as its place and the text; None: there is none."""
    if isinstance(value, str):
        return (where, value) if _MASKED.search(value) else None
    items: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        items = [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{where}[{position}]", item) for position, item in enumerate(value)]
    found = (mask_in(item, place) for place, item in items)
    return next((each for each in found if each is not None), None)


class Masking:
    """A text stream that masks credentials in what is written to it; else it is the stream that it wraps."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, masked."""
        self._stream.write(masked(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes texts, each masked."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _ignore(secret: str) -> None:
    """Does nothing with a credential."""


def _note(secret: str) -> None:
    for text in (secret.strip("'\"\\"), unquote(secret)):
        if len(text) >= _SHORTEST and not _is_harmless(text):
            _remembered.add(text)


def _without(text: str, note: Callable[[str], None]) -> str:
    """A text without credentials; ``note`` is called with each."""

    def address(found: re.Match[str]) -> str:
        start = found["scheme"] or found["path"]
        whole = found[0][len(start) : -1]
        if _REFERRED.fullmatch(whole):
            return found[0]
        note(whole.partition(":")[2] or whole)
        return f"{start}{MASK}@"

    def shape(found: re.Match[str]) -> str:
        note(found[0])
        return f"{found['hub'] or ''}{MASK}"

    def second(found: re.Match[str]) -> str:
        note(found[2])
        return f"{found[1]}{MASK}"

    known = _known()
    if known is not None:
        text = known.sub(lambda found: f"hf_{MASK}" if found[0].startswith("hf_") else MASK, text)
    if ":/" in text and "@" in text:
        text = _ADDRESS.sub(address, text)
    text = _SHAPES.sub(shape, text)
    if "=" in text or ":" in text:
        text = _HEADER.sub(second, _QUERY.sub(second, text))
        text = _unassigned(_ASSIGNED, text, note)
    text = _BEARER.sub(second, text)
    return _unassigned(_OPTION, text, note) if "-" in text else text


def _unassigned(names: re.Pattern[str], text: str, note: Callable[[str], None]) -> str:
    """A text without what it assigns to names of secrets."""
    parts, done, place = [], 0, 0
    while found := names.search(text, place):
        place = found.end()
        name = found["name"].lower()
        # in prose a colon comes behind any word; in a dictionary there are quotes before it
        prose = name == "token" and found["between"].lstrip(" \t").startswith(":")
        value = None if prose or not names_secret(name) else _VALUE.match(text, place)
        if value is None or (name.endswith("token") and _COUNT.match(text, place)):
            continue
        place = value.end()
        quotes = value["quote"] or ""
        core = value["inside"] if quotes else value[0].lstrip("'\"").rstrip(",;)]}")
        if not core or _is_harmless(core) or _is_harmless(value[0]):
            continue
        note(core)
        start = value.start() + (len(quotes) or value[0].index(core))
        parts += [text[done:start], MASK]
        done = start + len(core)
    return "".join([*parts, text[done:]])


def _is_harmless(value: str) -> bool:
    """Whether it is no secret although its name says so: nothing, a mask, or a reference to where it is."""
    bare = value.strip("'\"\\,;)]} \t").lower()
    is_mask = set(bare) == {"*"} or bare.startswith((f"{MASK}&", f"{MASK}#", f"hf_{MASK}"))
    return is_mask or bare in _NOTHING or _REFERENCE.fullmatch(value) is not None


@functools.lru_cache(4096)
def _is_secret_variable(name: str) -> bool:
    return names_secret(name)


def _known() -> re.Pattern[str] | None:
    """Known credentials, masked anywhere in a text; read each time, as the environment may change."""
    values = {
        value
        for name in os.environ
        if _is_secret_variable(name) and (value := os.environ.get(name, ""))
    }
    return _pattern(frozenset(values | _remembered))


@functools.lru_cache(16)
def _pattern(values: frozenset[str]) -> re.Pattern[str] | None:
    long = {value for value in values if len(value) >= _SHORTEST and set(value) != {"*"}}
    spelled = long | {quote(value, safe="") for value in long}
    if not spelled:
        return None
    return re.compile(
        "|".join(re.escape(value) for value in sorted(spelled, key=len, reverse=True))
    )
