"""What a configuration key is: a dataclass field that documents itself."""

from dataclasses import field, fields, is_dataclass
from typing import Any, get_type_hints


def option(
    default: Any, text: str, choices: tuple[str, ...] | None = None, least: float | None = None
) -> Any:
    """A documented configuration key.

    Its default, one sentence, and the values it takes where they are few.
    """
    metadata = {"help": text, "choices": choices, "least": least}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def describe(section: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """All keys below a section as (dotted name, dataclass field, section class)."""
    rows: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(section)
    for item in fields(section):
        if is_dataclass(hints[item.name]):
            rows += describe(hints[item.name], f"{prefix}{item.name}.")
        else:
            rows.append((f"{prefix}{item.name}", item, section))
    return rows
