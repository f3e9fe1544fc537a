"""A model family as data: axes, tensor rows, taps; loading and validating a table.

What a table says of one model lies in ``architecture.py``.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.families.grammar import Dim, Row, evaluate, names_in, parse_row, row_axes

TABLES = Path(__file__).parent / "tables"
VOCAB = "vocab"  # no score ranks its entries: which stay, a text decides (pruning/vocabulary.py)
OWN_TABLES = "MINITRON_FAMILIES"
"""Environment variable that names a table, or a folder of tables, of the user's; it outlives a process."""
CHOSEN_EXPERTS = "experts_per_token"
"""The axis of the experts that a token is sent to: in no tensor, and yet a plan may lower it."""
_INDEX = re.compile(r"\{(\w+)\}")


def _shown(value: Any, silent: Mapping[str, Any]) -> str:
    """A dataclass in words, without the fields that hold what ``silent`` says."""
    every = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
    told = (f"{k}={v!r}" for k, v in every.items() if k not in silent or v != silent[k])
    return f"{type(value).__qualname__}({', '.join(told)})"


@dataclass(frozen=True)
class Axis:
    """One named axis of a family.

    Attributes:
        name: the axis' name; the same in every family, also the key under ``plan`` and of
            ``minitron size``.
        config: keys of config.json that hold the size, first present wins; the first is written
            where none was. It may have none.
        scope: ``model`` where one ranking serves the whole model, else the placeholder whose every
            unit has a ranking of its own (``layer``, ``expert``).
        within: axis inside whose units this one is ranked (query heads inside their KV group).
        fallback: expression over config keys for the size where no key is present.
        fixed: never pruned.
        optional: the key may say 0 or null, for a model without such units; the size counts as 1 then.
        size: expression over config keys for the size where it is not what the key says; ``after``
            holds wherever the key is written with the size itself.
        follows: expression over axes that is the size in every plan.
        index: placeholder in tensor names that runs over this axis (``layer``), or None.
        lists: config keys with one entry per unit, cut with the axis; the value is an expression of
            the placeholder that says what a config without the key means, or None where it means
            nothing.
        indices: config keys that list unit numbers; the value is an expression that says which
            belong.
        counts: config keys that count units; the value is an expression that says which.
        every: expression of the placeholder that holds for each unit of a model that the table
            describes, or None.
        after: config values that hold once the axis was cut and its lists are spelled out.
        inexact: why removing a unit of zeros changes the output, or None where it does not.
    """

    name: str
    config: tuple[str, ...]
    scope: str = "layer"
    within: str | None = None
    fallback: str | None = None
    fixed: bool = False
    index: str | None = None
    lists: Mapping[str, str | None] = field(default_factory=dict)
    indices: Mapping[str, str] = field(default_factory=dict)
    every: str | None = None
    after: Mapping[str, Any] = field(default_factory=dict)
    inexact: str | None = None
    counts: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False
    size: str | None = None
    follows: str | None = None

    def __repr__(self) -> str:
        """As generated, without newer attributes that say nothing: fingerprints of users' tables hold it."""
        return _shown(self, {"counts": {}, "optional": False, "size": None, "follows": None})


@dataclass(frozen=True)
class TensorRow:
    """One row of the table: the tensors whose name matches ``pattern`` have the shape ``dims``.

    ``when`` is the condition under which a model has them, over config keys and the name's
    placeholders. A tensor that has another shape in layers of another kind has a row for each shape.
    """

    pattern: str
    dims: Row
    when: str | None
    regex: re.Pattern[str]

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Placeholders of the pattern, in order."""
        return tuple(_INDEX.findall(self.pattern))


@dataclass(frozen=True)
class Tap:
    """Where an activation is read: the ``side`` of the module at path ``module``.

    Its input, its output, or from inside the routed ``experts`` that it holds. ``dim`` are the axes
    along the activation's last dimension; None: those of the row of the module's weight.
    """

    side: str
    module: str
    dim: Dim | None = None

    def at(self, placeholder: str, layer: int) -> "Tap":
        """The tap in one layer."""
        return replace(self, module=self.module.replace(f"{{{placeholder}}}", str(layer)))


@dataclass(frozen=True)
class Fold:
    """A constant of the sizes by which the model multiplies a tensor of weights.

    When the sizes change, ``offset`` + the weights are multiplied by the constant before / after.
    """

    tensor: str
    by: str
    offset: float = 0.0
    when: str | None = None


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
    needs: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[re.Pattern[str], ...] = ()
    folds: tuple[Fold, ...] = ()
    logits: Mapping[str, str] = field(default_factory=dict)
    proofs: tuple[Mapping[str, Any], ...] = ({},)
    since: str = "5.0"
    zero_centred_norms: bool = False
    mtp: tuple[str, ...] = ()
    """Beginnings of the names of prediction layers (MTP); ``{layer}`` stands for one beyond the model's."""
    mtp_layers: tuple[str, ...] = ()
    """Keys of config.json that count them."""
    conditional: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Constraints that hold for some models, and the condition on config keys under which they do."""

    def __repr__(self) -> str:
        """As generated, without newer attributes that say nothing; see ``Axis``."""
        return _shown(self, {"mtp": (), "mtp_layers": ()})

    def for_config(self, config: Mapping[str, Any]) -> "Family":
        """The table of one model: its constraints are those that hold for this config.json.

        Raises:
            ValueError: a condition cannot be computed.
        """
        given = {key: value for key, value in config.items() if value is not None}
        values = {**self.defaults, **given}
        more = [rule for rule, when in self.conditional.items() if evaluate(when, values)]
        return replace(self, constraints=(*self.constraints, *more)) if more else self

    @property
    def prunable(self) -> tuple[str, ...]:
        """Names of the axes whose units scores rank and a plan may remove, in the table's order."""
        return tuple(name for name in self.resizable if name != VOCAB)

    @property
    def resizable(self) -> tuple[str, ...]:
        """Names of the axes whose size a plan may change: those, and the vocabulary."""
        return tuple(name for name, axis in self.axes.items() if not axis.fixed)

    @property
    def layer(self) -> str:
        """The placeholder of layers in tensor names and taps."""
        index = self.axes["layers"].index
        assert index is not None, "load_family lets no table without it pass"
        return index

    def ranked_per(self, name: str) -> tuple[str, ...]:
        """The axes each of whose units has its own ranking of this axis, outermost first."""
        axis = self.axes[name]
        if axis.scope in ("model", axis.index):
            return ()
        owner = self.indexed[axis.scope].name
        return (*self.ranked_per(owner), owner)

    @functools.cached_property
    def indexed(self) -> Mapping[str, Axis]:
        """Axes that appear as placeholders, by placeholder."""
        return {axis.index: axis for axis in self.axes.values() if axis.index is not None}


_KEYS = {
    "model_type", "architecture", "axes", "defaults", "tensors", "ignored", "taps", "modules", "constraints",
    "define", "fold", "logits", "mtp", "needs", "proofs", "since", "zero_centred_norms",
}  # fmt: skip
_AXIS_KEYS = {f.name for f in fields(Axis)} - {"name", "fallback"} | {"or"}


_UNREADABLE = (ValueError, TypeError, AttributeError, OSError, RecursionError, yaml.YAMLError)


def load_family(path: Path) -> Family:
    """Reads and validates one family table.

    Args:
        path: a YAML file as described in docs/families.md.

    Raises:
        ValueError: unknown keys, rows that do not parse, axes that are not declared, '?' without a
            condition; the message names the file and the line's content.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    rows = tuple(
        _row(key, text, axes, placeholders, spelled)
        for key, texts in table["tensors"].items()
        for text in (texts if isinstance(texts, list) else [texts])
    )
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
        mtp=tuple(table.get("mtp", {}).get("tensors", [])),
        mtp_layers=tuple(table.get("mtp", {}).get("layers", [])),
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
    used = set(_INDEX.findall(pattern))
    if used - placeholders:
        raise ValueError(f"{pattern}: placeholders {sorted(used - placeholders)} belong to no axis")
    parts = _INDEX.split(pattern)
    text = "".join(
        re.escape(part) if i % 2 == 0 else rf"(?P<{part}>\d+)" for i, part in enumerate(parts)
    )
    return re.compile(text)


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
