"""Why a value does not have the type of its key, in the words of the configuration's own files."""

import json
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from nemo_minitron.security.plain_text import plain

_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def misfit(hint: Any, value: Any, key: str) -> str | None:
    """One line on the first value whose type is not that of its key; None: all of them fit.

    Args:
        hint: the type that the schema declares for ``key``, or the dataclass of a section.
        value: plain values, as YAML reads them.
        key: the dotted name of what ``value`` stands for; empty for a whole configuration.
    """
    hint, optional = _without_none(hint)
    if hint is Any or (value is None and optional):
        return None
    if get_origin(hint) is Union:
        said = [misfit(part, value, key) for part in get_args(hint)]
        return None if None in said else said[0]
    if is_dataclass(hint) or get_origin(hint) is dict:
        return _section_misfit(hint, value, key)
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        if not isinstance(value, list | tuple):
            return _line(key, f"a list, as in {key}=[first,second]", value)
        return next((said for entry in value if (said := misfit(item, entry, key))), None)
    if _fits(hint, value):
        return None
    written_out = (
        f"; write {int(value)}"
        if hint is int and isinstance(value, float) and value.is_integer()
        else ""
    )  # 2e9 is no whole number to Hydra
    return _line(key, _EXPECTED[hint], value) + written_out


def _section_misfit(hint: Any, value: Any, key: str) -> str | None:
    if not isinstance(value, Mapping):
        example = f"{key}.KEY=VALUE".lstrip(".")
        return _line(key, f"a section with keys of its own, as in {example}", value)
    hints = get_type_hints(hint) if is_dataclass(hint) else dict.fromkeys(value, get_args(hint)[1])
    names = [name for name in value if name in hints]  # what is unknown is somebody else's to say
    inside = (misfit(hints[name], value[name], f"{key}.{name}".lstrip(".")) for name in names)
    return next((said for said in inside if said), None)


def as_declared(hint: Any, value: Any) -> Any:
    """Values with whole numbers as floats where the schema declares floats, as OmegaConf reads overrides."""
    hint, _ = _without_none(hint)
    if isinstance(value, Mapping) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return {key: as_declared(hints.get(key, Any), entry) for key, entry in value.items()}
    if isinstance(value, Mapping) and get_origin(hint) is dict:
        return {key: as_declared(get_args(hint)[1], entry) for key, entry in value.items()}
    if isinstance(value, list | tuple) and get_origin(hint) is list:
        return [as_declared(get_args(hint)[0], entry) for entry in value]
    return float(value) if hint is float and type(value) is int else value


def type_of(section: Any, key: str) -> Any:
    """The declared type of a dotted key below a section; None where no such key is declared."""
    for name in key.split("."):
        section, _ = _without_none(section)
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif is_dataclass(section) and name in get_type_hints(section):
            section = get_type_hints(section)[name]
        else:
            return None
    return section


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without its ``| None``, and whether it had one."""
    if get_origin(hint) not in (types.UnionType, Union):
        return hint, False
    rest = tuple(part for part in get_args(hint) if part is not type(None))
    return Union[rest], type(None) in get_args(hint)  # noqa: UP007  of one type it is that type


def _fits(hint: type, value: Any) -> bool:
    """As generous as OmegaConf, which takes the text "5" for a number and "yes" for true."""
    if isinstance(value, list | tuple | Mapping) or value is None:
        return False
    if hint is bool:
        return str(value).lower() in ("true", "false", "yes", "no", "on", "off", "y", "n", "0", "1")
    if hint is str:
        return True
    if isinstance(value, bool):
        return False
    try:
        number = float(value)
        return hint is float or isinstance(value, int) or str(value) == str(int(number))
    except (ValueError, OverflowError):
        return False


def _line(key: str, expected: str, value: Any) -> str:
    found = json.dumps(value, ensure_ascii=False, default=str)
    return f"{key or 'the configuration'}: expected {expected}, found {plain(found, 80)}"
