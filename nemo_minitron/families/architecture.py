"""A family's table applied to one model: sizes, tensor names, shapes, layers that have an axis."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nemo_minitron.families.family import CHOSEN_EXPERTS, Axis, Family, TensorRow
from nemo_minitron.families.grammar import evaluate, names_in, row_axes, row_shape
from nemo_minitron.families.table import families
from nemo_minitron.security.plain_text import plain


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a model, by the ``model_type`` in its config.json; see ``family_for``.

    Raises:
        ValueError: no family table has this model type; the message lists those that exist.
    """
    model_type = str(config.get("model_type"))
    if model_type in families():
        return family_for(families()[model_type], config, where)
    known = ", ".join(sorted(families()))
    shown = plain(model_type, 80)
    text = f"{where}: model_type {shown!r} is not supported; supported families: {known}"
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        text += (
            f". It wraps a text model ({plain(inner.get('model_type'), 80)!r}) together with other towers in "
            "a way that no table describes: save the text model alone as a causal LM first"
        )
    else:
        text += "; a table of your own can be given with families.path"
    raise ValueError(text)


def family_for(family: Family, config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The table of one model: its own constraints, and rows of one pattern kept apart.

    Of several rows with one pattern, each matches the names of its own layers only.

    Raises:
        ValueError: a condition cannot be computed.
    """
    try:
        family = family.for_config(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    count = Counter(row.pattern for row in family.rows)
    if max(count.values()) == 1:
        return family
    model = Architecture(family, config, where)
    rows = []
    for row in family.rows:
        if count[row.pattern] > 1:
            names = "|".join(re.escape(name) for name, _ in model.names(row, model.one_of_each))
            # groups are the placeholders'; what stands before them looks ahead
            row = replace(row, regex=re.compile(f"(?=(?:{names or '(?!)'})$){row.regex.pattern}"))
        rows.append(row)
    return replace(family, rows=tuple(rows))


@dataclass(frozen=True)
class Architecture:
    """One model, as its family's table and its config.json describe it.

    Attributes:
        family: the table.
        config: the config.json.
        where: what an error message calls the config.
    """

    family: Family
    config: Mapping[str, Any]
    where: str = "config.json"

    @cached_property
    def values(self) -> dict[str, Any]:
        """Values of the config keys that the table uses; the table's defaults for missing keys."""
        given = {key: value for key, value in self.config.items() if value is not None}
        return {**self.family.defaults, **given}

    def value(self, expression: str, **units: int) -> Any:
        """An expression over the config keys and the units of placeholders.

        Raises:
            ValueError: the config has none of a kind that it can be computed with.
        """
        try:
            return evaluate(expression, {**self.values, **units})
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every axis, in the table's order.

        Raises:
            ValueError: a size is missing, or is no positive integer.
        """
        found = {name: self._size(axis) for name, axis in self.family.axes.items()}
        check_counts(self.family, found, self.where)
        return found

    def _check_every(self, axis: Axis, count: int) -> None:
        """Refuses units of a kind that the table does not describe."""
        if axis.every is None or axis.index is None:
            return
        for unit in range(count):
            if not self.value(axis.every, **{axis.index: unit}):
                entries = {
                    key: self.config[key][unit] for key in axis.lists if self.config.get(key)
                }
                named = ", ".join(f"{key}[{unit}] {word!r:.40}" for key, word in entries.items())
                raise ValueError(
                    f"{self.where}: {axis.index} {unit}: no kind that {self.family.model_type} has: {named}"
                )

    def check_lists(self) -> None:
        """Refuses lists with an entry per unit that do not fit the number of units, or name an unknown kind.

        Raises:
            ValueError: one does; the message names its key.
        """
        for name, axis in self.family.axes.items():
            for key in axis.lists:
                entries, count = self.config.get(key), self.sizes[name]
                if not entries or (isinstance(entries, list | str) and len(entries) == count):
                    continue
                raise ValueError(
                    f"{self.where}: {plain(key, 80)} should list {count} {name}, found {entries!r:.80}"
                )
            self._check_every(axis, self.sizes[name])

    def _size(self, axis: Axis) -> int:
        present = [key for key in axis.config if key in self.values]
        computed = axis.size or (None if present else axis.fallback)
        if axis.optional and present and not self.values[present[0]]:
            return 1
        if present and computed is None:
            size = self.values[present[0]]
        elif computed is not None:
            try:
                size = evaluate(computed, self.values)
            except ValueError as error:
                raise ValueError(f"{self.where}: size of axis {axis.name}: {error}") from error
        else:
            raise ValueError(
                f"{self.where}: key {axis.config[0]!r} is missing (size of axis {axis.name})"
            )
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**40:
            raise ValueError(
                f"{self.where}: axis {axis.name}: expected a positive whole number, found {size!r:.40}"
            )
        return size

    @cached_property
    def present(self) -> dict[str, list[int]]:
        """The axes of the model's tensors, and the layers of each (an empty list: in no layer)."""
        layer = self.family.layer
        found: dict[str, set[int]] = {}
        for row in self.family.rows:
            axes = row_axes(row.dims) | {
                self.family.indexed[name].name for name in row.placeholders
            }
            for _, units in self.names(row, self.one_of_each):
                for axis in axes:
                    found.setdefault(axis, set()).update({units[layer]} if layer in units else ())
        return {name: sorted(found[name]) for name in self.family.axes if name in found}

    @property
    def prunable(self) -> list[str]:
        """Names of the axes that the model has and whose units scores rank, in the table's order."""
        return [name for name in self.family.prunable if name in self.present]

    @property
    def resizable(self) -> list[str]:
        """Names of the axes that the model has and whose size a plan may change."""
        return [name for name in self.family.resizable if name in self.present]

    @property
    def settable(self) -> list[str]:
        """Names of the axes whose number a plan may change: ``resizable``, and the experts for each token."""
        routed = "experts" in self.present and CHOSEN_EXPERTS in self.family.axes
        return [*self.resizable, *([CHOSEN_EXPERTS] if routed else [])]

    @cached_property
    def one_of_each(self) -> dict[str, int]:
        """The sizes, with one unit of every indexed axis but the layers; no condition depends on those."""
        single = {axis.name: 1 for axis in self.family.indexed.values() if axis.name != "layers"}
        return {**self.sizes, **single}

    def names(
        self, row: TensorRow, sizes: Mapping[str, int] | None = None
    ) -> Iterator[tuple[str, dict[str, int]]]:
        """Names that a row stands for in this model, with the units of their placeholders.

        Placeholders vary in the order in which the pattern names them, the last fastest.

        Args:
            row: a row of the family's table.
            sizes: how many units of an axis there are; None: as many as the model has.

        Raises:
            ValueError: the row's condition cannot be computed from the config.
        """
        number = self.sizes if sizes is None else sizes
        ranges = [range(number[self.family.indexed[name].name]) for name in row.placeholders]
        asked = names_in(row.when) if row.when else set()
        if row.when and not asked & set(row.placeholders) and not self.value(row.when):
            return
        outer, inner = row.placeholders[:1], row.placeholders[1:]
        for first in itertools.product(*ranges[:1]):
            units = dict(zip(outer, first, strict=True))
            if row.when and asked & set(outer) and not self.value(row.when, **units):
                continue
            for rest in itertools.product(*ranges[1:]):
                units = {**units, **dict(zip(inner, rest, strict=True))}
                yield fill(row.pattern, units), dict(units)

    def tensors(self) -> Iterator[tuple[str, TensorRow, tuple[int, ...]]]:
        """Every tensor that a checkpoint of this model holds: its name, its row and its shape."""
        for row in self.family.rows:
            shape = row_shape(row.dims, self.sizes)
            for name, _ in self.names(row):
                yield name, row, shape

    def has(self, row: TensorRow) -> bool:
        """Whether the model has any tensor of a row."""
        return any(True for _ in self.names(row))

    def resized(self, sizes: Mapping[str, int]) -> "Architecture":
        """The same with the given axis sizes written out.

        Also those it left implicit (``head_dim``), of the axes that the model has.
        """
        written = dict(self.config)
        for name, axis in self.family.axes.items():
            keys = [key for key in axis.config if key in self.config]
            written_out = name in self.present or sizes[name] != self.sizes[name]
            if not keys and written_out:
                keys = list(axis.config[:1])
            if axis.optional and not written_out:
                continue
            for key in keys:
                written[key] = sizes[name]
            if axis.size is not None:
                written.update(axis.after)
        return Architecture(self.family, written, self.where)

    def check_layers(self, layers: Sequence[int], where: str) -> None:
        """Refuses to drop every layer of a kind without which the architecture does not run.

        Raises:
            ValueError: the layers that remain have none of an axis that the family needs.
        """
        for axis in self.family.needs:
            if axis in self.present and not set(self.present[axis]) & set(layers):
                raise ValueError(
                    f"{where}: {self.family.model_type} needs a layer with {axis}; "
                    f"of {self.present[axis]} none is kept"
                )


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """A model by its config.json.

    Raises:
        ValueError: see ``family_of``.
    """
    return Architecture(family_of(config, where), config, where)


MOST_LAYERS, MOST_UNITS = 2_000, 200_000
"""Most layers, and most of layers x experts, that a model is taken to have: each has tensors of its own."""


def check_counts(family: Family, sizes: Mapping[str, int], where: str) -> None:
    """Refuses numbers of layers and experts that no model has, and whose tensors would fill the memory.

    Raises:
        ValueError: there are too many.
    """
    counted = {axis.name: sizes[axis.name] for axis in family.indexed.values()}
    if counted["layers"] > MOST_LAYERS:
        raise ValueError(
            f"{where}: axis layers: expected at most {MOST_LAYERS:,}, found {counted['layers']:,}"
        )
    if math.prod(counted.values()) > MOST_UNITS:
        found = " x ".join(f"{name}={size:,}" for name, size in counted.items())
        raise ValueError(f"{where}: expected at most {MOST_UNITS:,} in all, found {found}")


def check_sizes(family: Family, sizes: Mapping[str, int], where: str) -> None:
    """Refuses sizes that the architecture cannot have.

    Raises:
        ValueError: a constraint of the family does not hold; the message states it with its
            numbers. Or there are more layers or experts than ``check_counts`` admits.
    """
    check_counts(family, sizes, where)
    for constraint in family.constraints:
        if not evaluate(constraint, sizes):
            found = ", ".join(f"{name}={sizes[name]}" for name in sorted(names_in(constraint)))
            raise ValueError(f"{where}: {family.model_type} needs {constraint}, found {found}")


def fill(pattern: str, units: Mapping[str, int]) -> str:
    """A pattern with its placeholders replaced by numbers."""
    for name, unit in units.items():
        pattern = pattern.replace(f"{{{name}}}", str(unit))
    return pattern


def predicts(family: Family, name: str, layers: int) -> bool:
    """Whether a tensor of a model of so many layers belongs to a prediction layer behind them."""
    for beginning in family.mtp:
        head, placeholder, _ = beginning.partition(f"{{{family.layer}}}")
        if not placeholder:
            if name.startswith(beginning):
                return True
        elif (found := re.match(rf"{re.escape(head)}(\d{{1,9}})\.", name)) is not None:
            return int(found[1]) >= layers
    return False


def find_row(family: Family, name: str) -> tuple[TensorRow, dict[str, int]] | None:
    """The row that a tensor name matches and the units its placeholders stand for, or None."""
    others = (row for _, other in family.stacked for row in other)
    for row in itertools.chain(family.rows, others):
        match = row.regex.fullmatch(name)
        if match:
            return row, {index: int(unit) for index, unit in match.groupdict().items()}
    return None
