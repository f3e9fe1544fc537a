"""The user's words as they were typed: where a key holds text, Hydra and YAML must not read a number.

``workspace=1e-4`` is a folder named 1e-4, ``export.tag=1.10`` no 1.1, and a path may hold ``=``, spaces
or letters of any language. In Hydra's grammar such words need quotes; here they get them.
"""

import functools
import re
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_minitron.config.config import Config
from nemo_minitron.config.option import describe
from nemo_minitron.families.table import read_yaml

_OVERRIDE = re.compile(r"(?P<before>\+{0,2}(?P<key>[\w.]+)=)(?P<value>.*)", re.DOTALL)
_TEXTS = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""Reads each value as the text that it is written as."""
_HYDRA_S_OWN = ("'", '"', "[", "{")
"""What a value begins with that is quoted, a list or a section."""


@functools.cache
def _keys(*types: Any) -> frozenset[str]:
    return frozenset(
        name
        for name, item, section in describe(Config)
        if get_type_hints(section)[item.name] in types
    )


def as_typed(override: str) -> str:
    """An override whose text Hydra reads as it was typed.

    What has quotes, a backslash or an interpolation is Hydra's grammar already, and stays.
    """
    found = _OVERRIDE.fullmatch(override)
    if found is None:
        return override
    key, value = found["key"], found["value"].strip()
    if not value or "\\" in value or "${" in value:
        return override
    if key in _keys(str, str | None):
        if value.startswith(_HYDRA_S_OWN) or value.lower() == "null":
            return override
        return found["before"] + _quoted(value)
    if key in _keys(list[str], list[str] | None):
        inside = value[1:-1]
        if value[0] + value[-1] != "[]" or re.search(r"['\"\[\]{}()]", inside):
            return override
        parts = [part.strip() for part in inside.split(",")]
        return (
            found["before"] + f"[{','.join(_quoted(part) for part in parts)}]"
            if all(parts)
            else override
        )
    return override


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def unreadable(overrides: list[str]) -> str | None:
    """One line on the first override that does not follow Hydra's grammar; None: all do."""
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            reason = str(error).splitlines()[0].split(" expecting ")[0]
            return (
                f"{override!r}: not an override of Hydra's grammar ({reason}); a value with special "
                "characters goes in quotes, as in \"key='value'\""
            )
    return None


def check_file(path: Path) -> None:
    """Checks that YAML reads a configuration's texts as they are written.

    Raises:
        ValueError: a text was read as a number or truth value, which changes it (1.10 is 1.1).
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    written, read = yaml.load(text, _TEXTS), read_yaml(text)  # noqa: S506  texts only
    truths = {name for name, item, _ in describe(Config) if item.metadata["synonyms"]}
    for name in sorted(_keys(str, str | None) - truths):
        one, other = _at(written, name), _at(read, name)
        if isinstance(one, str) and isinstance(other, bool | int | float) and str(other) != one:
            raise ValueError(
                f"{path}: {name}: YAML reads {one} as {other}; write '{one}' in quotes"
            )


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
