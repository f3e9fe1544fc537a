"""Loading and validating a family's table."""

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.families.family import INDEX, Axis, Family, Fold, Tap, TensorRow, names_of
from nemo_minitron.families.grammar import names_in, parse_row, row_axes

TABLES = Path(__file__).parent / "tables"
OWN_TABLES = "MINITRON_FAMILIES"
"""Environment variable that names a table, or a folder of tables, of the user's; it outlives a process."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""``SafeLoader`` by libyaml, where PyYAML has it.

It reads all tables in a fifth of the time (0.07 s, not 0.36), and refuses what is nested thousands of
levels deep, over which Python's own loader would sit for hours.
"""

_KEYS = {
    "model_type", "architecture", "axes", "defaults", "tensors", "ignored", "taps", "modules", "constraints",
    "define", "fold", "logits", "mtp", "needs", "proofs", "since", "stacked", "zero_centred_norms",
}  # fmt: skip
_MTP_KEYS = {"tensors", "layers", "block", "like", "rows"}
_AXIS_KEYS = {f.name for f in fields(Axis)} - {"name", "fallback"} | {"or"}


_UNREADABLE = (ValueError, TypeError, AttributeError, OSError, RecursionError, yaml.YAMLError)


def read_yaml(text: str) -> Any:
    """What ``yaml.safe_load`` reads, by libyaml where PyYAML has it."""
    return yaml.load(text, LOADER)  # noqa: S506 (a SafeLoader)


def load_family(path: Path) -> Family:
    """Reads and validates one family table.

    Args:
        path: a YAML file as described in docs/families.md.

    Raises:
        ValueError: unknown keys, rows that do not parse, axes that are not declared, '?' without a
            condition; the message names the file and the line's content.
    """
    try:
        table = read_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("expected a mapping")
        return _family(table)
    except KeyError as error:
        raise ValueError(f"family table {path}: key {error} is missing") from error
    except _UNREADABLE as error:
        raise ValueError(f"family table {path}: {error}") from error


def _family(table: Mapping[str, Any]) -> Family:
    unknown = set(table) - _KEYS
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}; known are {sorted(_KEYS)}")
    spelled = _spelled(table.get("define", {}))
    axes = {name: _axis(name, entry, spelled) for name, entry in table["axes"].items()}
    placeholders = {axis.index for axis in axes.values() if axis.index}
    if "layers" not in axes or axes["layers"].index is None:
        raise ValueError("an axis 'layers' with an index is needed")
    for axis in axes.values():
        if axis.scope not in {"model", "layer", *placeholders}:
            raise ValueError(f"axis {axis.name}: scope {axis.scope!r} is no placeholder")
        if axis.within is not None and axis.within not in axes:
            raise ValueError(f"axis {axis.name}: within {axis.within!r} is no axis")
    rows = _rows(table["tensors"], axes, spelled)
    mtp = _mtp(table.get("mtp", {}))
    rules = [text.partition(" if ") for text in table.get("constraints", [])]
    for constraint, _, _ in rules:
        if names_in(constraint) - set(axes):
            raise ValueError(f"constraint {constraint!r} names axes that are not declared")
    for axis in axes.values():
        if axis.follows is not None and names_in(axis.follows) - set(axes):
            raise ValueError(f"axis {axis.name}: follows axes that are not declared")
    return Family(
        model_type=table["model_type"],
        architecture=table["architecture"],
        axes=axes,
        rows=rows,
        taps={name: tuple(_tap(text) for text in taps) for name, taps in table["taps"].items()},
        modules=table["modules"],
        constraints=tuple(rule for rule, _, when in rules if not when),
        conditional={rule: spelled(when) for rule, _, when in rules if when},
        needs=tuple(table.get("needs", [])),
        defaults=table.get("defaults", {}),
        ignored=tuple(_regex(pattern, placeholders) for pattern in table.get("ignored", [])),
        folds=tuple(Fold(**entry) for entry in table.get("fold", [])),
        logits=table.get("logits", {}),
        proofs=tuple(table.get("proofs", [{}])),
        since=str(table.get("since", "5.0")),
        zero_centred_norms=table.get("zero_centred_norms", False),
        mtp=tuple(mtp.get("tensors", [])),
        mtp_layers=tuple(mtp.get("layers", [])),
        mtp_block=mtp.get("block", ""),
        mtp_like=mtp.get("like", {}),
        stacked=tuple(
            (
                tuple(row for row in rows if row.pattern.startswith(begin)),
                _rows(entry, axes, spelled),
            )
            for begin, entry in table.get("stacked", {}).items()
        ),
        mtp_rows=_rows(mtp.get("rows", {}), axes, spelled),
    )


def _mtp(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = set(entry) - _MTP_KEYS
    if unknown:
        raise ValueError(f"mtp: unknown keys {sorted(unknown)}; known are {sorted(_MTP_KEYS)}")
    return entry


def _rows(
    entries: Mapping[str, Any], axes: Mapping[str, Axis], spelled: Callable[[str], str]
) -> tuple[TensorRow, ...]:
    return tuple(
        _row(key, text, axes, {axis.index for axis in axes.values() if axis.index}, spelled)
        for key, texts in entries.items()
        for text in (texts if isinstance(texts, list) else [texts])
    )


def _spelled(define: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces the names that the table defines by their expressions."""
    known: dict[str, str] = {}

    def spell(expression: str) -> str:
        for name, meaning in known.items():
            pattern = rf"\b{name}\b(?!['\"])"  # not inside a string
            expression = re.sub(pattern, lambda _, text=f"({meaning})": text, expression)  # type: ignore[misc]
        names_in(expression)  # refuses what does not parse
        return expression

    for name, meaning in define.items():
        known[name] = spell(meaning)
    return spell


def _axis(name: str, entry: Mapping[str, Any], spelled: Callable[[str], str]) -> Axis:
    unknown = set(entry) - _AXIS_KEYS
    if unknown:
        raise ValueError(
            f"axis {name}: unknown keys {sorted(unknown)}; known are {sorted(_AXIS_KEYS)}"
        )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
    }
    if "or" in values:
        values["fallback"] = spelled(str(values.pop("or")))
    for key in {"every", "size"} & set(values):
        values[key] = spelled(str(values[key]))
    for key in ("lists", "indices", "counts"):
        entries = values.get(key, {})
        values[key] = {item: text and spelled(str(text)) for item, text in entries.items()}
    if not values["config"] and "fallback" not in values:
        raise ValueError(f"axis {name}: without keys of config.json it needs 'or'")
    if not values["config"] and not values.get("fixed") and "follows" not in values:
        raise ValueError(f"axis {name}: without keys of config.json it is fixed, or follows others")
    return Axis(name=name, **values)


def _row(
    key: str,
    text: str,
    axes: Mapping[str, Axis],
    placeholders: set[str],
    spelled: Callable[[str], str],
) -> TensorRow:
    shape, _, when = text.partition(" if ")
    if key.endswith("?") != bool(when):
        raise ValueError(
            f"{key}: a row with '?' needs 'if CONDITION' after its shape, and only such a row"
        )
    dims = parse_row(shape)
    undeclared = row_axes(dims) - set(axes)
    if undeclared:
        raise ValueError(f"{key}: axes {sorted(undeclared)} are not declared")
    pattern = key.removesuffix("?")
    return TensorRow(
        pattern, dims, spelled(when.strip()) if when else None, _regex(pattern, placeholders)
    )


def _regex(pattern: str, placeholders: set[str]) -> re.Pattern[str]:
    used = set(INDEX.findall(pattern))
    if used - placeholders:
        raise ValueError(f"{pattern}: placeholders {sorted(used - placeholders)} belong to no axis")
    return names_of(pattern)


def _tap(text: str) -> Tap:
    match = re.fullmatch(r"(input|output|experts) of (\S+)(?: as (.+))?", text)
    if match is None:
        raise ValueError(f"tap {text!r}: expected 'input (output, experts) of MODULE' [as AXES]")
    return Tap(match[1], match[2], parse_row(f"({match[3]})")[0] if match[3] else None)


def use_tables(path: str | Path) -> None:
    """Adds the user's own table, or a folder of tables; they override those of the package.

    It also holds for processes that this one starts.

    Raises:
        ValueError: there is none, or one does not load.
    """
    found = Path(path).expanduser().absolute()
    for table in _own(found):
        load_family(table)
    os.environ[OWN_TABLES] = str(found)
    families.cache_clear()


def _own(path: Path) -> list[Path]:
    tables = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not tables or not tables[0].is_file():
        raise ValueError(
            f"families.path: {path}: no such table (expected a .yaml file or a folder of them)"
        )
    return tables


def own_tables() -> Mapping[str, Family]:
    """The user's own families by ``model_type``."""
    paths = _own(Path(os.environ[OWN_TABLES])) if os.environ.get(OWN_TABLES) else []
    return {family.model_type: family for family in map(load_family, paths)}


@functools.cache
def families() -> Mapping[str, Family]:
    """All families by ``model_type``: those that come with the package, and the user's own."""
    loaded = map(load_family, sorted(TABLES.glob("*.yaml")))
    return {**{family.model_type: family for family in loaded}, **own_tables()}
