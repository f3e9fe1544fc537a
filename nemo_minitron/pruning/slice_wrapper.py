"""The other parts of a multimodal model around a text model that was cut.

They are carried over byte for byte, but for the few tensors that write or read the text model's hidden
channels.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint, load_tensor, read_entry
from nemo_minitron.checkpoints.dtypes import DTYPES, FLOATS, TORCH
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.shard_writer import Planned, write_weights
from nemo_minitron.checkpoints.tensor_rows import Entry
from nemo_minitron.families import VOCAB, Architecture, with_text
from nemo_minitron.families.grammar import Dim
from nemo_minitron.families.wrapper import TEXT
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.slice_predictions import CutPredictions
from nemo_minitron.pruning.tokenizer_cut import ids_renumbered, new_ids
from nemo_minitron.security.plain_text import plain

HIDDEN, _ANY = "hidden", "any"


def check_surroundings(checkpoint: Checkpoint) -> None:
    """Refuses other parts that could not be cut along with the text model.

    Raises:
        ValueError: none of the tensors that the table names is there; one has another shape than the
            text model's width asks for; one is no plain floating-point tensor.
    """
    around = checkpoint.around
    assert around is not None, "only a multimodal model has surroundings"
    width = checkpoint.architecture.sizes[HIDDEN]
    if not any(around.wrapper.row(name) for name in around.entries):
        expected = next(iter(around.wrapper.rows))[0].pattern.replace("\\", "")
        raise ValueError(
            f"{checkpoint.folder}: none of its tensors is known to have the text model's hidden channels; of "
            f"{around.wrapper.model_type} expected {expected} or the like"
        )
    for name, entry in around.entries.items():
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{checkpoint.folder}: {plain(name, 120)} is stored as {plain(entry.dtype, 40)}; "
                "floating-point weights are expected"
            )
        row = around.wrapper.row(name)
        long = [1 if _axis(dim) == _ANY else width for dim in row or ()]
        fits = len(long) == len(entry.shape) and all(
            found == asked for found, asked in zip(entry.shape, long, strict=True) if asked > 1
        )
        if row is not None and not fits:
            raise ValueError(
                f"{checkpoint.folder}: {plain(name, 120)}: expected the text model's {width} hidden channels "
                f"along dimension {long.index(width)}, found shape {list(entry.shape)}"
            )


class CutSurroundings:
    """The tensors of the other parts as they stand around a cut text model.

    Args:
        checkpoint: the source.
        cut: how its text model was cut.
    """

    def __init__(self, checkpoint: Checkpoint, cut: Cut) -> None:
        assert checkpoint.around is not None, "only a multimodal model has surroundings"
        self._checkpoint, self._around = checkpoint, checkpoint.around
        self._ids = new_ids(cut.keep[VOCAB]) if VOCAB in cut.keep else None
        kept = cut.keep.get(HIDDEN)
        self._keep: dict[str, dict[str, Tensor]] = {}  # by the part that a tensor belongs to
        if kept is None:
            return
        for name in self._around.entries:
            if self._around.wrapper.row(name) is not None:
                self._keep.setdefault(_part(name), {HIDDEN: kept})
        for part, keep in self._keep.items():
            for axis in self._around.wrapper.inner:
                keep[axis] = self._strongest(part, axis, len(kept))

    @property
    def source(self) -> Path:
        """The folder that they come from."""
        return self._checkpoint.folder

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Tensor name on disk to dtype and shape in the result."""
        return {
            name: replace(entry, shape=self._shape(name, entry))
            for name, entry in self._around.entries.items()
        }

    def stored_name(self, name: str) -> str:
        """The name on disk of one of the text model's tensors, as the source spells it."""
        return self._around.wrapper.stored_name(name, self._around.stored)

    def config(self, text: Architecture) -> dict[str, Any]:
        """The whole model's config.json around a text model."""
        before = both_spellings(self._checkpoint.config)
        after = both_spellings(text.config)
        whole = self._around.config
        written = with_text(self._around.wrapper, whole, before, after, text.sizes)
        outer, inner = self._named(whole), self._named(whole[TEXT])
        return {**written, **outer, TEXT: {**written[TEXT], **inner}}

    def processor_file(self, path: Path) -> bytes:
        """A file that says how images are prepared, with the ids of the smaller vocabulary."""
        content = path.read_bytes()
        named = self._named(json.loads(content))
        if not named:
            return content
        return (json.dumps({**json.loads(content), **named}, indent=2) + "\n").encode()

    def _named(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some settings that name tokens, with their new ids; none where all entries stay."""
        where = str(self.source)
        return {} if self._ids is None else ids_renumbered(settings, self._ids, where)

    def read(self, name: str) -> Tensor:
        """One tensor of the result."""
        tensor = read_entry(self._checkpoint.folder, self._around.entries[name], name)
        for position, index in self._indices(name):
            tensor = tensor.index_select(position, index)
        return tensor.contiguous()

    def _indices(self, name: str) -> list[tuple[int, Tensor]]:
        row, keep = self._around.wrapper.row(name), self._keep.get(_part(name), {})
        axes = [_axis(dim) for dim in (row or ())]
        return [(position, keep[axis]) for position, axis in enumerate(axes) if axis in keep]

    def _shape(self, name: str, entry: Entry) -> tuple[int, ...]:
        shape = list(entry.shape)
        for position, index in self._indices(name):
            shape[position] = len(index)
        return tuple(shape)

    def _strongest(self, part: str, axis: str, count: int) -> Tensor:
        """Units of a projector's own dimension with the largest product of their weights' l2 norms.

        Shape [count], ascending. They are no hidden channels: the text model's scores say nothing of
        them.
        """
        norms = []
        for name, entry in self._around.entries.items():
            row = self._around.wrapper.row(name)
            if row is None or _part(name) != part or len(row) < 2:
                continue
            places = [position for position, dim in enumerate(row) if _axis(dim) == axis]
            if places:
                weights = read_entry(self._checkpoint.folder, entry, name).float()
                norms.append(weights.movedim(places[0], 0).flatten(1).norm(dim=1))
        if not norms:
            return torch.arange(count)
        product = torch.stack(norms).log().sum(dim=0)
        return product.topk(count).indices.sort().values


def write_causal_lm(
    checkpoint: Checkpoint,
    folder: Path,
    dtype_of: Callable[[str], torch.dtype],
    shard_bytes: int,
    behind: CutPredictions | None = None,
) -> dict[str, str]:
    """Streams a causal LM's weights into a folder, one tensor in memory at a time.

    Args:
        checkpoint: the model.
        folder: an existing folder.
        dtype_of: what a tensor is cast to.
        shard_bytes: largest shard.
        behind: its prediction layers; None: none go along.

    Returns:
        File name to SHA-256.
    """
    every = {**checkpoint.entries, **({} if behind is None else behind.entries)}
    planned = [Planned(name, DTYPES[dtype_of(name)], entry.shape) for name, entry in every.items()]

    def cast(name: str) -> Tensor:
        return _read(checkpoint, behind, name).to(dtype_of(name))

    return write_weights(folder, planned, cast, shard_bytes)


def write_whole(
    text: Checkpoint,
    around: CutSurroundings,
    folder: Path,
    dtype_of: Callable[[str], torch.dtype],
    other: torch.dtype | None,
    shard_bytes: int,
    behind: CutPredictions | None = None,
) -> dict[str, str]:
    """Streams a multimodal model's weights into a folder: a text model, and the parts around it.

    Args:
        text: the text model.
        around: the other parts.
        folder: an existing folder.
        dtype_of: what a tensor of the text model is cast to.
        other: what those of the other parts are cast to; None: they stay as they are stored.
        shard_bytes: largest shard.
        behind: the text model's prediction layers; None: none go along.

    Returns:
        File name to SHA-256.
    """
    every = {**text.entries, **({} if behind is None else behind.entries)}
    inside = {around.stored_name(name): name for name in every}
    planned = [
        Planned(stored, DTYPES[dtype_of(name)], every[name].shape)
        for stored, name in inside.items()
    ]
    kinds = {name: other or TORCH[entry.dtype] for name, entry in around.entries.items()}
    planned += [
        Planned(name, DTYPES[kinds[name]], entry.shape) for name, entry in around.entries.items()
    ]

    def cast(stored: str) -> Tensor:
        if stored in inside:
            return _read(text, behind, inside[stored]).to(dtype_of(inside[stored]))
        return around.read(stored).to(kinds[stored])

    return write_weights(folder, planned, cast, shard_bytes)


def _read(checkpoint: Checkpoint, behind: CutPredictions | None, name: str) -> Tensor:
    if name in checkpoint.entries:
        return load_tensor(checkpoint, name)
    assert behind is not None, "all other tensors are those of prediction layers"
    return behind.read(name)


def _axis(dim: Dim) -> str:
    return dim[0][0]


def _part(name: str) -> str:
    """The module that a tensor of a projector belongs to: neighbours share their inner dimension."""
    return re.sub(r"\.[^.]+\.(weight|bias)$", "", name)
