"""Applies a family table to one model: sizes, tensor names, shapes, layers that have an axis."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_minitron.families.grammar import evaluate, names_in, row_axes, row_shape
from nemo_minitron.families.table import Family, TensorRow, families


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a model, by the ``model_type`` in its config.json.

    Raises:
        ValueError: no family table has this model type; the message lists those that exist.
    """
    model_type = str(config.get("model_type"))
    if model_type in families():
        return families()[model_type]
    known = ", ".join(sorted(families()))
    text = f"{where}: model_type {model_type!r} is not supported; supported families: {known}"
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        text += (
            f". It wraps a text model ({inner.get('model_type')!r}) together with other towers: "
            "save the text model alone as a causal LM first"
        )
    else:
        text += "; a table of your own can be given with families.path"
    raise ValueError(text)


def config_values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the config keys that a table uses; the table's defaults for missing keys."""
    return {**family.defaults, **{key: value for key, value in config.items() if value is not None}}


def axis_sizes(
    family: Family, config: Mapping[str, Any], where: str = "config.json"
) -> dict[str, int]:
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
    values = config_values(family, config)
    sizes: dict[str, int] = {}
    for name, axis in family.axes.items():
        present = [key for key in axis.config if key in values]
        if present:
            size = values[present[0]]
        elif axis.fallback is not None:
            try:
                size = evaluate(axis.fallback, values)
            except ValueError as error:
                raise ValueError(f"{where}: size of axis {name}: {error}") from error
        else:
            raise ValueError(f"{where}: key {axis.config[0]!r} is missing (size of axis {name})")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**40:
            raise ValueError(
                f"{where}: axis {name}: expected a positive whole number, found {size!r:.40}"
            )
        sizes[name] = size
    return sizes


def check_sizes(family: Family, sizes: Mapping[str, int], where: str) -> None:
    """Refuses sizes that the architecture cannot have.

    Raises:
        ValueError: a constraint of the family does not hold; the message states it with its
            numbers.
    """
    for constraint in family.constraints:
        if not evaluate(constraint, sizes):
            found = ", ".join(f"{name}={sizes[name]}" for name in sorted(names_in(constraint)))
            raise ValueError(f"{where}: {family.model_type} needs {constraint}, found {found}")


def check_layers(
    family: Family, config: Mapping[str, Any], layers: Sequence[int], where: str
) -> None:
    """Refuses to drop every layer of a kind without which the architecture does not run.

    Raises:
        ValueError: the layers that remain have none of an axis that the family needs.
    """
    present = present_axes(family, config)
    for axis in family.needs:
        if axis in present and not set(present[axis]) & set(layers):
            raise ValueError(
                f"{where}: {family.model_type} needs a layer with {axis}; of {present[axis]} none is kept"
            )


def config_with_sizes(
    family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """A copy of a config.json with the given axis sizes written out.

    Also those it left implicit (``head_dim``), of the axes that the model has.
    """
    written = dict(config)
    has = present_axes(family, config)
    for name, axis in family.axes.items():
        keys = [key for key in axis.config if key in config]
        if not keys and name in has:
            keys = [axis.config[0]]
        for key in keys:
            written[key] = sizes[name]
    return written


def tensor_names(
    family: Family, row: TensorRow, config: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Names that a row stands for in one model, with the units of their placeholders.

    Placeholders vary in the order in which the pattern names them, the last fastest.

    Raises:
        ValueError: the row's condition cannot be computed from the config.
    """
    values = config_values(family, config)
    asked = names_in(row.when) if row.when else set()
    if row.when and not asked & set(row.placeholders) and not evaluate(row.when, values):
        return
    outer, inner = row.placeholders[:1], row.placeholders[1:]
    for first in itertools.product(*(range(sizes[family.indexed[name].name]) for name in outer)):
        units = dict(zip(outer, first, strict=True))
        if row.when and asked & set(outer) and not evaluate(row.when, {**values, **units}):
            continue
        for rest in itertools.product(*(range(sizes[family.indexed[name].name]) for name in inner)):
            units = {**units, **dict(zip(inner, rest, strict=True))}
            yield fill(row.pattern, units), dict(units)


def has_tensor(family: Family, row: TensorRow, config: Mapping[str, Any]) -> bool:
    """Whether a model with this config has any tensor of this row."""
    return any(True for _ in tensor_names(family, row, config, axis_sizes(family, config)))


def fill(pattern: str, units: Mapping[str, int]) -> str:
    """A pattern with its placeholders replaced by numbers."""
    for name, unit in units.items():
        pattern = pattern.replace(f"{{{name}}}", str(unit))
    return pattern


def expected_tensors(
    family: Family, config: Mapping[str, Any]
) -> Iterator[tuple[str, TensorRow, tuple[int, ...]]]:
    """Every tensor that a checkpoint with this config holds: its name, its row and its shape."""
    sizes = axis_sizes(family, config)
    for row in family.rows:
        shape = row_shape(row.dims, sizes)
        for name, _ in tensor_names(family, row, config, sizes):
            yield name, row, shape


def present_axes(family: Family, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The axes of this model's tensors, and the layers that each appears in (an empty list: in no layer)."""
    sizes = axis_sizes(family, config)
    placeholder = family.axes["layers"].index or ""
    found: dict[str, set[int]] = {}
    for row in family.rows:
        axes = row_axes(row.dims) | {family.indexed[name].name for name in row.placeholders}
        for _, units in tensor_names(family, row, config, {**sizes, **_one_of_each(family)}):
            for axis in axes:
                found.setdefault(axis, set()).update(
                    {units[placeholder]} if placeholder in units else ()
                )
    return {name: sorted(found[name]) for name in family.axes if name in found}


def _one_of_each(family: Family) -> dict[str, int]:
    """Sizes with one unit of every indexed axis but the layers, since no condition depends on the others."""
    return {axis.name: 1 for axis in family.indexed.values() if axis.name != "layers"}


def find_row(family: Family, name: str) -> tuple[TensorRow, dict[str, int]] | None:
    """The row that a tensor name matches and the units its placeholders stand for, or None."""
    for row in family.rows:
        match = row.regex.fullmatch(name)
        if match:
            return row, {index: int(unit) for index, unit in match.groupdict().items()}
    return None
