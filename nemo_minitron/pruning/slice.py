"""Slicing tensors along named axes, and rewriting config.json to match ([P1] section 2.3, trimming)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.families import (
    CHOSEN_EXPERTS,
    VOCAB,
    Architecture,
    Family,
    TensorRow,
    evaluate,
    fill,
    find_row,
)
from nemo_minitron.families.grammar import row_axes, row_shape
from nemo_minitron.pruning.head_merge import HeadMerge, Mix, attention_rows, mix_of, mixed
from nemo_minitron.pruning.positions import dim_index
from nemo_minitron.pruning.select import Keep, followed
from nemo_minitron.pruning.tokenizer_cut import new_ids, renumbered
from nemo_minitron.security.plain_text import plain


@dataclass(frozen=True)
class Cut:
    """A cut of one model: the kept units of every shrinking axis, and the kept layers."""

    source: Architecture
    keep: Keep
    layers: tuple[int, ...]
    experts_per_token: int | None = None
    """Experts that a token is sent to in the result; None: as many as in the source."""
    merge: HeadMerge | None = None
    """What query heads that go leave in those that stay; None: nothing."""

    @property
    def family(self) -> Family:
        """The table of source and result."""
        return self.source.family

    @property
    def before(self) -> dict[str, int]:
        """Axis sizes of the source."""
        return self.source.sizes

    @cached_property
    def after(self) -> dict[str, int]:
        """Axis sizes of the result."""
        kept = {name: index.shape[-1] for name, index in self.keep.items()}
        if self.experts_per_token is not None:
            kept[CHOSEN_EXPERTS] = self.experts_per_token
        return followed(self.family, {**self.before, **kept, "layers": len(self.layers)})

    @cached_property
    def attention(self) -> Mapping[str, str]:
        """Rows of the table that heads are merged in, by pattern; none without a merge.

        Raises:
            ValueError: see ``attention_rows``.
        """
        return {} if self.merge is None else attention_rows(self.source, self.merge.how)

    @cached_property
    def result(self) -> Architecture:
        """The pruned model.

        Raises:
            ValueError: see ``cut_config``.
        """
        return Architecture(self.family, cut_config(self), self.source.where)


@dataclass(frozen=True)
class Piece:
    """One tensor of the result.

    Attributes:
        name: its name in the result.
        source: its name in the source checkpoint.
        row: its row in the table.
        shape: its shape in the result.
        indices: per dimension the positions that survive, or None where all do; a tensor of shape
            [extent of dimension 0, surviving] where each unit of dimension 0 keeps positions of its
            own.
        scale, offset: ``offset`` + weights are multiplied by ``scale`` (a folded constant); 1 and 0
            else.
        mix: a dimension whose surviving positions are sums, or None.
    """

    name: str
    source: str
    row: TensorRow
    shape: tuple[int, ...]
    indices: tuple[Tensor | None, ...]
    scale: float = 1.0
    offset: float = 0.0
    mix: Mix | None = None


def pieces(cut: Cut, names: Sequence[str]) -> Iterator[Piece]:
    """The tensors that survive a cut, in the order of the source.

    Args:
        cut: what is cut.
        names: tensor names of the source checkpoint.

    Raises:
        ValueError: a name that no row of the family knows.
    """
    for name in names:
        found = find_row(cut.family, name)
        if found is None and any(pattern.fullmatch(name) for pattern in cut.family.ignored):
            continue
        if found is None:
            raise ValueError(
                f"tensor {name!r} belongs to no row of family {cut.family.model_type!r}"
            )
        row, units = found
        renumbered = _renumbered(cut, units)
        if renumbered is None:
            continue
        keep = unit_keep(cut, row, units)
        indices = surviving(row, cut.before, keep)
        scale, offset = fold_of(cut, name)
        yield Piece(
            fill(row.pattern, renumbered),
            name,
            row,
            row_shape(row.dims, cut.after),
            indices,
            scale,
            offset,
            _mix(cut, row, units, keep),
        )


def _mix(
    cut: Cut, row: TensorRow, units: Mapping[str, int], keep: Mapping[str, Tensor]
) -> Mix | None:
    """How a tensor's heads are merged, or None."""
    if cut.merge is None or row.pattern not in cut.attention:
        return None
    into_U = cut.merge.into_LU[units[cut.family.layer]]
    role = cut.attention[row.pattern]
    return mix_of(row, role, cut.merge.how, into_U, keep, cut.before)


def _renumbered(cut: Cut, units: Mapping[str, int]) -> dict[str, int] | None:
    """The numbers of a tensor's units in the result, or None if one of them is removed."""
    result = {}
    for placeholder, unit in units.items():
        axis = cut.family.indexed[placeholder].name
        if axis == "layers":
            kept = list(cut.layers)
        elif axis in cut.keep:
            kept = _at(cut, axis, units).tolist()
        else:
            kept = list(range(cut.before[axis]))
        if unit not in kept:
            return None
        result[placeholder] = kept.index(unit)
    return result


def _at(cut: Cut, axis: str, units: Mapping[str, int]) -> Tensor:
    """The kept units of an axis, for the layer and expert in a tensor's name, if it has them."""
    index = cut.keep[axis]
    for owner in cut.family.ranked_per(axis):
        placeholder = cut.family.axes[owner].index
        if placeholder is None or placeholder not in units:
            break
        index = index[units[placeholder]]
    return index


def unit_keep(cut: Cut, row: TensorRow, units: Mapping[str, int]) -> dict[str, Tensor]:
    """The kept units of each axis of a row for one tensor.

    Shape [kept]; [extent of dimension 0, kept] where dimension 0 is the axis whose units rank it
    each.

    Raises:
        ValueError: the row mixes such an axis with a dimension 0 of another kind.
    """
    keep = {}
    for axis in row_axes(row.dims) & set(cut.keep):
        index = _at(cut, axis, units)
        if index.dim() > 1 and (
            index.dim() > 2 or row.dims[0] != ((cut.family.ranked_per(axis)[-1],),)
        ):
            raise ValueError(
                f"{row.pattern}: nothing in the name or in dimension 0 says whose {axis} these are"
            )
        keep[axis] = index
    return keep


def surviving(
    row: TensorRow, sizes: Mapping[str, int], keep: Mapping[str, Tensor]
) -> tuple[Tensor | None, ...]:
    """Positions that survive along every dimension of a tensor; see ``Piece.indices``."""
    own = {axis: index for axis, index in keep.items() if index.dim() > 1}
    shared = {axis: index for axis, index in keep.items() if index.dim() == 1}
    indices: list[Tensor | None] = []
    for dim in row.dims:
        if any(axis in own for product in dim for axis in product):
            count = next(iter(own.values())).shape[0]
            each = [
                dim_index(dim, sizes, {**shared, **{a: i[unit] for a, i in own.items()}})
                for unit in range(count)
            ]
            indices.append(torch.stack([index for index in each if index is not None]))
        else:
            indices.append(dim_index(dim, sizes, shared))
    return tuple(indices)


def cut_tensor(tensor: Tensor, piece: Piece, sizes: Mapping[str, int]) -> Tensor:
    """Slices one tensor in memory along every axis that its row names.

    Args:
        tensor: weights of the shape that ``piece.row`` states.
        piece: what survives.
        sizes: size of every axis in the source model.

    Returns:
        A contiguous tensor of ``piece.shape``.

    Raises:
        ValueError: the tensor does not have the shape that its row states.
    """
    expected = row_shape(piece.row.dims, sizes)
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{piece.source}: expected shape {list(expected)}, found {list(tensor.shape)}"
        )
    for position, index in enumerate(piece.indices):
        if piece.mix is not None and piece.mix.dim == position:
            tensor = mixed(tensor, piece.mix)
        elif index is not None and index.dim() == 1:
            tensor = tensor.index_select(position, index.to(tensor.device))
    for position, index in enumerate(piece.indices):
        if index is not None and index.dim() == 2:
            kept = index if piece.indices[0] is None else index[piece.indices[0]]
            sides = {0: kept.shape[0], position: kept.shape[1]}
            shape = [sides.get(i, 1) for i in range(tensor.dim())]
            target = [*tensor.shape[:position], kept.shape[1], *tensor.shape[position + 1 :]]
            tensor = tensor.gather(position, kept.reshape(shape).expand(target).to(tensor.device))
    return rescaled(tensor, piece).contiguous()


def rescaled(tensor: Tensor, piece: Piece) -> Tensor:
    """Multiplies ``offset`` + weights by the piece's scale, computed in float32."""
    if piece.scale == 1.0:
        return tensor
    return ((tensor.float() + piece.offset) * piece.scale - piece.offset).to(tensor.dtype)


def fold_of(cut: Cut, name: str) -> tuple[float, float]:
    """Scale and offset of a tensor that the model multiplies by a constant of its sizes."""
    for fold in cut.family.folds:
        applies = fold.when is None or cut.source.value(fold.when)
        if _is_of(cut, name, fold.tensor) and applies:
            return evaluate(fold.by, cut.before) / evaluate(fold.by, cut.after), fold.offset
    return 1.0, 0.0


def _is_of(cut: Cut, name: str, pattern: str) -> bool:
    if "{" not in pattern:
        return name == pattern
    found = find_row(cut.family, name)
    return found is not None and found[0].pattern == pattern


def cut_config(cut: Cut) -> dict[str, Any]:
    """The pruned model's config.json: every size explicit, head_dim too; per-layer lists cut.

    Raises:
        ValueError: a per-layer list does not have one entry per layer, or a list that may be one is
            not known.
    """
    cut.source.check_lists()
    written = dict(cut.source.resized(cut.after).config)
    if VOCAB in cut.keep:
        written = renumbered(written, new_ids(cut.keep[VOCAB]), cut.source.where)
    written.update({key: 0 for key in cut.family.mtp_layers if written.get(key)})  # left out
    axis = cut.family.axes["layers"]
    if len(cut.layers) == cut.before["layers"]:
        return written
    placeholder = cut.family.layer
    every = [{placeholder: layer} for layer in range(cut.before["layers"])]
    for key, meaning in axis.lists.items():
        entries = cut.source.config.get(key)  # an empty list says as little as none
        if not entries and meaning is None:
            continue
        if not entries and meaning is not None:
            entries = [cut.source.value(meaning, **one) for one in every]
        assert isinstance(entries, list | str), "check_lists lets nothing else pass"
        chosen = [entries[layer] for layer in cut.layers]
        written[key] = "".join(chosen) if isinstance(entries, str) else chosen
    for key in _unnamed_lists(cut.source):
        written[key] = [cut.source.config[key][layer] for layer in cut.layers]
    for key, meaning in axis.indices.items():
        belongs = [bool(cut.source.value(meaning, **one)) for one in every]
        written[key] = [new for new, old in enumerate(cut.layers) if belongs[old]]
    for key, meaning in axis.counts.items():
        belongs = [bool(cut.source.value(meaning, **one)) for one in every]
        written[key] = sum(belongs[layer] for layer in cut.layers)
    return {**written, **axis.after}


def pattern_notes(source: Architecture, layers: Sequence[int]) -> list[str]:
    """Advice on lists per layer that follow the family's own pattern no longer, once layers were dropped.

    transformers reads the list; programs that compute the pattern from a constant instead, as llama.cpp
    does for Gemma 2 and 3, gpt-oss and SmolLM3, would give some layers the wrong kind without a word.
    ``export.gguf`` writes another constant where llama.cpp reads one, and is refused else.
    """
    axis, placeholder = source.family.axes["layers"], source.family.layer
    lines = []
    for key, meaning in axis.lists.items():
        if meaning is None:
            continue
        every = [source.value(meaning, **{placeholder: i}) for i in range(source.sizes["layers"])]
        entries = source.config.get(key) or every
        if [entries[layer] for layer in layers] != every[: len(layers)]:
            lines.append(
                f"{key}: its pattern is that of the kept layers now; a program that computes it instead of "
                "reading the list runs another model, as llama.cpp does with Gemma 2 and 3, gpt-oss and "
                "SmolLM3 (export.gguf writes a pattern that llama.cpp can compute, and is refused else)"
            )
    return lines


_EVERYWHERE = ("layer_types", "mlp_layer_types")
"""Lists with an entry per layer that transformers reads in the config.json of every family."""
_NO_LAYERS = re.compile(r"_token_ids?$|^architectures$|^id2label$|^_")
"""Keys whose lists have nothing to do with layers, however long they are."""


def _unnamed_lists(source: Architecture) -> list[str]:
    """Keys of config.json with an entry per layer that the family's table does not name.

    Raises:
        ValueError: one whose meaning is not known: left as it is, it would not fit fewer layers.
    """
    axis = source.family.axes["layers"]
    named = {*axis.lists, *axis.indices, *_EVERYWHERE}
    for key, value in source.config.items():
        if (
            isinstance(value, list)
            and len(value) == source.sizes["layers"]
            and key not in named
            and not _NO_LAYERS.search(key)
        ):
            raise ValueError(
                f"{source.where}: {plain(key, 80)} lists {len(value)} entries, one for each layer it seems, "
                f"and the table of {source.family.model_type} does not name it; remove it, or name it under "
                "lists in a table of your own (families.path), before layers are dropped"
            )
    return [
        key
        for key in _EVERYWHERE
        if key not in axis.lists
        and isinstance(source.config.get(key), list)
        and len(source.config[key]) == source.sizes["layers"]
    ]
