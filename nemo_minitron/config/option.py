"""What a configuration key is: a dataclass field that documents itself."""

import functools
from dataclasses import field, fields, is_dataclass
from typing import Any, get_type_hints

from nemo_minitron.config.bounds import Bounds


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    bounds: Bounds | None = None,
    synonyms: dict[str, str] | None = None,
) -> Any:
    """A documented configuration key.

    Args:
        default: its default.
        text: one sentence on what it means.
        choices: the texts it takes, where they are few.
        least: the smallest number it takes.
        bounds: the numbers it takes, where there is more to say; of a list or dictionary, each of them.
        synonyms: words in small letters that stand for one of the choices, YAML's truth values among
            them.
    """
    metadata = {
        "help": text,
        "choices": choices,
        "bounds": bounds or Bounds(least),
        "synonyms": synonyms or {},
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def describe(section: Any, prefix: str = "") -> tuple[tuple[str, Any, Any], ...]:
    """All keys below a section as (dotted name, dataclass field, section class)."""
    rows: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(section)
    for item in fields(section):
        if is_dataclass(hints[item.name]):
            rows += describe(hints[item.name], f"{prefix}{item.name}.")
        else:
            rows.append((f"{prefix}{item.name}", item, section))
    return tuple(rows)


def meaning(item: Any) -> str:
    """What a key means, the words that it takes where they are few, and the range of its numbers."""
    text = str(item.metadata["help"])
    if item.metadata["choices"]:
        text += f" (one of: {', '.join(item.metadata['choices'])})"
    return text + (f"; {item.metadata['bounds']}" if str(item.metadata["bounds"]) else "")
