"""A model family as data: axes, tensor rows, taps.

``table.py`` reads one; what it says of one model lies in ``architecture.py``.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nemo_minitron.families.grammar import Dim, Row, evaluate

VOCAB = "vocab"  # no score ranks its entries: which stay, a text decides (pruning/vocabulary.py)
CHOSEN_EXPERTS = "experts_per_token"
"""The axis of the experts that a token is sent to: in no tensor, and yet a plan may lower it."""
INDEX = re.compile(r"\{(\w+)\}")


def _shown(value: Any, silent: Mapping[str, Any]) -> str:
    """A dataclass in words, without the fields that hold what ``silent`` says."""
    every = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
    shown = (f"{k}={v!r}" for k, v in every.items() if k not in silent or v != silent[k])
    return f"{type(value).__qualname__}({', '.join(shown)})"


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
        return tuple(INDEX.findall(self.pattern))


def names_of(pattern: str) -> re.Pattern[str]:
    """The tensor names that a row's pattern stands for; a group for each placeholder."""
    parts = INDEX.split(pattern)
    text = "".join(
        re.escape(part) if i % 2 == 0 else rf"(?P<{part}>\d+)" for i, part in enumerate(parts)
    )
    return re.compile(text)


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
    mtp_block: str = ""
    """Beginning of the names of a prediction layer's tensors that any layer has; empty: no row says."""
    mtp_like: Mapping[str, Any] = field(default_factory=dict)
    """Config values under which a layer of the model is what a prediction layer is."""
    mtp_rows: tuple[TensorRow, ...] = ()
    """A prediction layer's other tensors."""
    stacked: tuple[tuple[tuple[TensorRow, ...], tuple[TensorRow, ...]], ...] = ()
    """Rows of ``rows``, and those of other tensors that a checkpoint may have in their place."""
    conditional: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Constraints that hold for some models, and the condition on config keys under which they do."""

    def __repr__(self) -> str:
        """As generated, without newer attributes that say nothing; see ``Axis``."""
        silent = {
            "mtp": (),
            "mtp_layers": (),
            "mtp_block": "",
            "mtp_like": {},
            "mtp_rows": (),
            "stacked": (),
        }
        return _shown(self, silent)

    def spelled(self, names: Iterable[str]) -> "Family":
        """The table of a checkpoint whose tensors have these names: where it has others, their rows."""
        family, held = self, list(names)
        for mine, other in self.stacked:
            if not any(row.regex.fullmatch(name) for row in other for name in held):
                continue
            rows = tuple(row for row in family.rows if row not in mine)
            pairs = tuple((b, a) if a == mine else (a, b) for a, b in family.stacked)
            family = replace(family, rows=(*rows, *other), stacked=pairs)
        return family

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
