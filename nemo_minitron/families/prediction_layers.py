"""Multi-token prediction layers (MTP) behind a model, as a model of their own.

A prediction layer is a layer as the model has them, with an entrance before it (norms of the last hidden
states and of the next token's embedding, and a matrix that reads both) and a norm behind it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nemo_minitron.families.architecture import Architecture, family_for, predicts
from nemo_minitron.families.family import VOCAB, TensorRow, names_of
from nemo_minitron.families.grammar import row_axes
from nemo_minitron.security.plain_text import plain


@dataclass(frozen=True)
class PredictionLayers:
    """The prediction layers of one model.

    Attributes:
        architecture: they alone: its layers are the prediction layers, numbered from zero in its tensors'
            names.
        head: what stands before a layer's number in a tensor's name.
        behind: whether the numbers on disk go on behind the model's own layers.
    """

    architecture: Architecture
    head: str
    behind: bool

    @property
    def number(self) -> re.Pattern[str]:
        """The beginning of a layer's tensors' names; its group is the layer's number."""
        return re.compile(rf"{re.escape(self.head)}(\d{{1,9}})\.")

    def inner_name(self, name: str, layers: int) -> str:
        """A tensor's name in ``architecture``, of its name behind a model of so many layers."""
        return self._moved(name, -layers)

    def stored_name(self, name: str, layers: int) -> str:
        """A tensor's name on disk behind a model of so many layers, of its name in ``architecture``."""
        return self._moved(name, layers)

    def _moved(self, name: str, by: int) -> str:
        found = self.number.match(name)
        if found is None or not self.behind:
            return name
        return f"{self.head}{int(found[1]) + by}.{name[found.end() :]}"


def prediction_layers(model: Architecture, names: Iterable[str]) -> PredictionLayers | None:
    """The prediction layers that some tensors are of; None where the family's table does not describe them.

    Args:
        model: the model that they stand behind.
        names: names on disk of the checkpoint's tensors.

    Raises:
        ValueError: the table does not know one of the tensors, or one is missing.
    """
    family, layers = model.family, model.sizes["layers"]
    held = [name for name in names if predicts(family, name, layers)]
    if not family.mtp_block or not held:
        return None
    one = layers_behind(model, 1)
    inner = {one.inner_name(name, layers) for name in held}
    numbers = {match[1] for name in inner if (match := one.number.match(name)) is not None}
    found = layers_behind(model, max(1, len(numbers)))
    alone = found.architecture
    found = replace(found, architecture=replace(alone, family=alone.family.spelled(inner)))
    _check(found, inner, layers)
    return found


def layers_behind(model: Architecture, count: int) -> PredictionLayers:
    """So many prediction layers behind a model whose family's table describes them."""
    family = model.family
    index = f"{{{family.layer}}}."
    trunk = next(row.pattern for row in family.rows if index in row.pattern)
    trunk = trunk[: trunk.index(index) + len(index)]

    def moved(rows: Iterable[TensorRow]) -> tuple[TensorRow, ...]:
        patterns = [(row, row.pattern.removeprefix(trunk)) for row in rows if trunk in row.pattern]
        return tuple(
            replace(row, pattern=family.mtp_block + rest, regex=names_of(family.mtp_block + rest))
            for row, rest in patterns
        )

    stacked = tuple((moved(mine), moved(other)) for mine, other in family.stacked)
    rows = (*moved(family.rows), *family.mtp_rows)
    alone = replace(family, rows=rows, stacked=stacked, mtp=())
    config = {**model.config, **family.mtp_like}
    config |= {key: count for key in family.axes["layers"].config if key in config}
    architecture = Architecture(family_for(alone, config, model.where), config, model.where)
    head = family.mtp_block.removesuffix(index)
    return PredictionLayers(architecture, head, behind=trunk == family.mtp_block)


def _check(found: PredictionLayers, inner: set[str], layers: int) -> None:
    """Refuses tensors that the table does not know, and layers that lack some.

    The embedding and the head repeat the model's own, and not all checkpoints hold them.
    """
    model = found.architecture
    rows = {name: row for name, row, _ in model.tensors()}
    missing = {name for name in set(rows) - inner if VOCAB not in row_axes(rows[name].dims)}
    for kind, names in (("is in no row", inner - set(rows)), ("is missing", missing)):
        for name in sorted(names):
            raise ValueError(
                f"{model.where}: prediction layers of {model.family.model_type}: "
                f"{plain(found.stored_name(name, layers), 200)} {kind}"
            )
