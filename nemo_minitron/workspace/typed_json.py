"""JSON files of a workspace, held against types: what is damaged is named by file and field.

A workspace may have been edited by hand, cut short by a full disk, or come from somebody else. So
every file is read by one reader, which says what it expected and what to do, and gives its callers
values of the types that they name.
"""

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.layout import MADE_BY, manifest_in

DEPTH = 64
"""Levels of lists and objects in each other that a file may have."""
_LONG = 60
_NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
    list: "a list", tuple: "a list", dict: "an object",
}  # fmt: skip


def read_json(path: Path, shape: Any, otherwise: str = "damaged") -> Any:
    """A JSON file's value.

    Args:
        path: the file, which is there.
        shape: the type that it has: ``Any``, ``None``, ``bool``, ``int``, ``float``, ``str``, a
            union, a list, a tuple, a ``dict`` with texts as keys, of any of them; a dataclass
            (exactly its fields; made of them) or a ``TypedDict`` (others are let be).
        otherwise: what a damaged file is called.

    Raises:
        ValueError: it is damaged; the message names file and field, and says what to do.
    """
    try:
        return _fitted(_value(path.read_bytes()), shape, "")
    except ValueError as error:
        raise ValueError(f"{path}: {otherwise}: {error}; {remedy(path)}") from None


def read_lines(path: Path, shape: Any) -> list[Any]:
    """Values of a file with one JSON object in each line, which tells of the past only.

    A line cut off by a kill is left out. So is one that is damaged, with a note on the error
    output: nothing that is made depends on it.
    """
    if not path.is_file():
        return []
    text = path.read_bytes()
    found, damaged = [], 0
    for line in text[: text.rfind(b"\n") + 1].split(b"\n"):
        try:
            found += [_fitted(_value(line), shape, "")] if line.strip() else []
        except ValueError:
            damaged += 1
    if damaged:
        lines = "a damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
        print(f"note: {plain(path)}: {lines} left out", file=sys.stderr)
    return found


def remedy(path: Path) -> str:
    """What to do about a damaged file of a workspace."""
    back = "put it back as it was, or remove"
    for folder in (path.parent, path.parent.parent):
        if folder.name in MADE_BY and manifest_in(folder).is_file():
            return f"{back} {folder} and run 'minitron {MADE_BY[folder.name]}' again"
    return f"{back} it"


def _value(text: bytes) -> Any:
    """The value that a text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, found another byte at {error.start}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"expected JSON, found none: {error}") from None
    if b"\\ud" in text.lower() and not _encodable(value):
        raise ValueError("expected text, found half a character (a lone surrogate)")
    level = [value]
    for _ in range(DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {DEPTH} levels")


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _children(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in inside if isinstance(child, dict | list)]


def _fitted(value: Any, shape: Any, where: str) -> Any:
    """A value as its type has it.

    Raises:
        ValueError: it is of another.
    """
    if shape is Any:
        return value
    origin, inner = typing.get_origin(shape), typing.get_args(shape)
    if origin in (types.UnionType, typing.Union):
        return _one_of(value, inner, where)
    kind = _kind(shape if origin is None else origin)
    if not _is(value, kind):
        raise ValueError(f"{_at(where)}expected {_NAMES[kind]}, found {_found(value)}")
    if kind is dict:
        return _object(value, shape, inner, where)
    if kind is list:
        return _sequence(value, origin or shape, inner, where)
    return value


def _kind(shape: Any) -> type:
    """Which of JSON's types a type is written as."""
    if shape in (list, tuple):
        return list
    if shape in (dict, Mapping) or dataclasses.is_dataclass(shape) or typing.is_typeddict(shape):
        return dict
    kind = type(None) if shape is None else shape
    assert kind in _NAMES, kind
    return typing.cast(type, kind)


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _one_of(value: Any, shapes: tuple[Any, ...], where: str) -> Any:
    for shape in shapes:
        if _is(value, _kind(typing.get_origin(shape) or shape)):
            return _fitted(value, shape, where)
    named = " or ".join(_NAMES[_kind(typing.get_origin(shape) or shape)] for shape in shapes)
    raise ValueError(f"{_at(where)}expected {named}, found {_found(value)}")


def _sequence(value: list[Any], kind: Any, inner: tuple[Any, ...], where: str) -> Any:
    shapes = inner[:1] * len(value) if kind is list or Ellipsis in inner else inner
    if len(shapes) != len(value):
        raise ValueError(f"{_at(where)}expected {len(shapes)} entries, found {len(value)}")
    return kind(
        _fitted(each, shape, f"{where}[{number}]")
        for number, (each, shape) in enumerate(zip(value, shapes, strict=True))
    )


def _object(value: dict[str, Any], shape: Any, inner: tuple[Any, ...], where: str) -> Any:
    if inner:
        return {name: _fitted(each, inner[1], _below(where, name)) for name, each in value.items()}
    hints = _hints(shape)
    if not typing.is_typeddict(shape):
        unknown = next((name for name in value if name not in hints), None)
        if unknown is not None:
            raise ValueError(f"{_at(_below(where, unknown))}unknown")
    missing = next((name for name in _needed(shape) if name not in value), None)
    if missing is not None:
        raise ValueError(f"{_at(where)}expected {missing}, found none")
    fitted = {
        name: _fitted(each, hints[name], _below(where, name)) if name in hints else each
        for name, each in value.items()
    }
    return fitted if typing.is_typeddict(shape) else shape(**fitted)


@functools.lru_cache(maxsize=64)
def _hints(shape: Any) -> dict[str, Any]:
    return typing.get_type_hints(shape)


@functools.lru_cache(maxsize=64)
def _needed(shape: Any) -> tuple[str, ...]:
    if not dataclasses.is_dataclass(shape):
        return tuple(sorted(shape.__required_keys__))
    nothing = dataclasses.MISSING
    return tuple(
        field.name
        for field in dataclasses.fields(shape)
        if field.default is nothing and field.default_factory is nothing
    )


def _below(where: str, name: str) -> str:
    return f"{where}.{plain(name, _LONG)}" if where else plain(name, _LONG)


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _found(value: Any) -> str:
    if isinstance(value, list | dict) or value is None:
        return _NAMES[type(value)]
    return plain(json.dumps(value), _LONG)
