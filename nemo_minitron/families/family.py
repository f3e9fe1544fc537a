"""A model family as data.

Axes, tensor rows, taps. Loading, validation and the pure questions asked of a table.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.families.grammar import Row, evaluate, names_in, parse_row, row_axes, row_shape

TABLES = Path(__file__).parent / "tables"
_INDEX = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Axis:
    """One named axis of a family.

    Attributes:
        name: the axis' name; the same in every family, also the key under ``plan`` and of ``minitron size``.
        config: keys of config.json that hold the size, first present wins; the first is written where none
            was.
        scope: ``model`` where one ranking serves the whole model, ``layer`` where every layer has its own.
        within: axis inside whose units this one is ranked (query heads inside their KV group).
        fallback: expression over config keys for the size where no key is present.
        fixed: never pruned.
        index: placeholder in tensor names that runs over this axis (``layer``), or None.
        lists: config keys holding one entry per unit, cut together with the axis.
    """

    name: str
    config: tuple[str, ...]
    scope: str = "layer"
    within: str | None = None
    fallback: str | None = None
    fixed: bool = False
    index: str | None = None
    lists: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorRow:
    """One row of the table: the tensors whose name matches ``pattern`` have the shape ``dims``."""

    pattern: str
    dims: Row
    when: str | None
    regex: re.Pattern[str]


@dataclass(frozen=True)
class Tap:
    """Where an activation is read: the ``side`` (input or output) of the module at path ``module``."""

    side: str
    module: str


@dataclass(frozen=True)
class Family:
    """What scoring, planning, cutting and sizing need to know about an architecture."""

    model_type: str
    architecture: str
    axes: Mapping[str, Axis]
    rows: tuple[TensorRow, ...]
    taps: Mapping[str, tuple[Tap, ...]]
    modules: Mapping[str, str]
    constraints: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[re.Pattern[str], ...] = ()
    zero_centred_norms: bool = False

    @property
    def prunable(self) -> tuple[str, ...]:
        """Names of the axes whose size a plan may change, in the table's order."""
        return tuple(name for name, axis in self.axes.items() if not axis.fixed)

    @property
    def indexed(self) -> tuple[Axis, ...]:
        """Axes that appear as placeholders in tensor names."""
        return tuple(axis for axis in self.axes.values() if axis.index is not None)


_KEYS = {
    "model_type", "architecture", "axes", "defaults", "tensors", "when", "ignored", "taps", "modules",
    "constraints", "zero_centred_norms",
}  # fmt: skip
_AXIS_KEYS = {f.name for f in fields(Axis)} - {"name", "fallback"} | {"or"}


def load_family(path: Path) -> Family:
    """Reads and validates one family table.

    Args:
        path: a YAML file as described in docs/families.md.

    Raises:
        ValueError: unknown keys, rows that do not parse, axes that are not declared, '?' without a
            condition; the message names the file and the line's content.
    """
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _family(table)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"family table {path}: {error}") from error


def _family(table: Mapping[str, Any]) -> Family:
    unknown = set(table) - _KEYS
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}; known are {sorted(_KEYS)}")
    axes = {name: _axis(name, entry) for name, entry in table["axes"].items()}
    placeholders = {axis.index for axis in axes.values() if axis.index}
    conditions = dict(table.get("when", {}))
    rows = []
    for key, text in table["tensors"].items():
        pattern, optional = key.removesuffix("?"), key.endswith("?")
        if optional != (pattern in conditions):
            raise ValueError(f"{key}: a row with '?' needs an entry under 'when', and only such a row")
        dims = parse_row(text)
        undeclared = row_axes(dims) - set(axes)
        if undeclared:
            raise ValueError(f"{key}: axes {sorted(undeclared)} are not declared")
        rows.append(TensorRow(pattern, dims, conditions.pop(pattern, None), _regex(pattern, placeholders)))
    if conditions:
        raise ValueError(f"'when' names rows that do not exist: {sorted(conditions)}")
    for constraint in table.get("constraints", []):
        if names_in(constraint) - set(axes):
            raise ValueError(f"constraint {constraint!r} names axes that are not declared")
    return Family(
        model_type=table["model_type"],
        architecture=table["architecture"],
        axes=axes,
        rows=tuple(rows),
        taps={name: tuple(_tap(text) for text in taps) for name, taps in table["taps"].items()},
        modules=table["modules"],
        constraints=tuple(table.get("constraints", [])),
        defaults=table.get("defaults", {}),
        ignored=tuple(_regex(pattern, placeholders) for pattern in table.get("ignored", [])),
        zero_centred_norms=table.get("zero_centred_norms", False),
    )


def _axis(name: str, entry: Mapping[str, Any]) -> Axis:
    unknown = set(entry) - _AXIS_KEYS
    if unknown:
        raise ValueError(f"axis {name}: unknown keys {sorted(unknown)}; known are {sorted(_AXIS_KEYS)}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
    }
    if "or" in values:
        values["fallback"] = values.pop("or")
    return Axis(name=name, **values)


def _regex(pattern: str, placeholders: set[str]) -> re.Pattern[str]:
    used = set(_INDEX.findall(pattern))
    if used - placeholders:
        raise ValueError(f"{pattern}: placeholders {sorted(used - placeholders)} belong to no axis")
    parts = _INDEX.split(pattern)
    text = "".join(re.escape(part) if i % 2 == 0 else rf"(?P<{part}>\d+)" for i, part in enumerate(parts))
    return re.compile(text)


def _tap(text: str) -> Tap:
    match = re.fullmatch(r"(input|output) of (\S+)", text)
    if match is None:
        raise ValueError(f"tap {text!r}: expected 'input of MODULE' or 'output of MODULE'")
    return Tap(match.group(1), match.group(2))


@functools.cache
def families() -> Mapping[str, Family]:
    """All families that come with the package, by ``model_type``."""
    loaded = [load_family(path) for path in sorted(TABLES.glob("*.yaml"))]
    return {family.model_type: family for family in loaded}


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a model, by the ``model_type`` in its config.json.

    Raises:
        ValueError: no family table has this model type; the message lists those that exist.
    """
    model_type = str(config.get("model_type"))
    if model_type not in families():
        known = ", ".join(sorted(families()))
        raise ValueError(f"{where}: model_type {model_type!r} is not supported; supported families: {known}")
    return families()[model_type]


def axis_sizes(family: Family, config: Mapping[str, Any], where: str = "config.json") -> dict[str, int]:
    """Size of every axis of a model.

    Args:
        family: the table.
        config: the model's config.json.
        where: what an error message calls the config.

    Returns:
        Axis name to size, in the table's order.

    Raises:
        ValueError: a size is missing, or is no positive integer.
    """
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    sizes: dict[str, int] = {}
    for name, axis in family.axes.items():
        present = [key for key in axis.config if key in values]
        if present:
            size = values[present[0]]
        elif axis.fallback is not None:
            size = evaluate(axis.fallback, values)
        else:
            raise ValueError(f"{where}: key {axis.config[0]!r} is missing (size of axis {name})")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{where}: axis {name}: expected a positive whole number, found {size!r}")
        sizes[name] = size
    return sizes


def check_sizes(family: Family, sizes: Mapping[str, int], where: str) -> None:
    """Refuses sizes that the architecture cannot have.

    Raises:
        ValueError: a constraint of the family does not hold; the message states it with its numbers.
    """
    for constraint in family.constraints:
        if not evaluate(constraint, sizes):
            found = ", ".join(f"{name}={sizes[name]}" for name in sorted(names_in(constraint)))
            raise ValueError(f"{where}: {family.model_type} needs {constraint}, found {found}")


def config_with_sizes(family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """A copy of a config.json with the given axis sizes written out.

    Also those it left implicit (``head_dim``).
    """
    written = dict(config)
    for name, axis in family.axes.items():
        keys = [key for key in axis.config if key in config] or [axis.config[0]]
        for key in keys:
            written[key] = sizes[name]
    return written


def has_row(family: Family, row: TensorRow, config: Mapping[str, Any]) -> bool:
    """Whether a model with this config has the tensors of this row."""
    if row.when is None:
        return True
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    return bool(evaluate(row.when, values))


def expected_tensors(
    family: Family, config: Mapping[str, Any]
) -> Iterator[tuple[str, TensorRow, tuple[int, ...]]]:
    """Every tensor that a checkpoint with this config holds: its name, its row and its shape."""
    sizes = axis_sizes(family, config)
    for row in family.rows:
        if has_row(family, row, config):
            shape = row_shape(row.dims, sizes)
            for name in expand(family, row.pattern, sizes):
                yield name, row, shape


def expand(family: Family, pattern: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """All names that a pattern with placeholders stands for, in order."""
    for axis in family.indexed:
        if f"{{{axis.index}}}" in pattern:
            for unit in range(sizes[axis.name]):
                yield from expand(family, pattern.replace(f"{{{axis.index}}}", str(unit)), sizes)
            return
    yield pattern


def find_row(family: Family, name: str) -> tuple[TensorRow, dict[str, int]] | None:
    """The row that a tensor name matches and the units its placeholders stand for, or None."""
    for row in family.rows:
        match = row.regex.fullmatch(name)
        if match:
            return row, {index: int(unit) for index, unit in match.groupdict().items()}
    return None
