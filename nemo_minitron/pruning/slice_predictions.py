"""Multi-token prediction layers (MTP) as they stand behind a model that was cut."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint, read_entry
from nemo_minitron.checkpoints.tensor_rows import Entry
from nemo_minitron.families import Architecture, PredictionLayers, fill, prediction_layers
from nemo_minitron.pruning.select import Keep, select_units
from nemo_minitron.pruning.slice import Cut, Piece, cut_tensor, pieces
from nemo_minitron.security.plain_text import plain

Rank = Callable[[Architecture, list[str], Callable[[str], Tensor]], Mapping[str, Tensor]]
"""Scores of a model's units from its weights alone: the model, names of its tensors, what reads one."""


class CutPredictions:
    """The tensors of prediction layers, cut along with the model that they stand behind.

    Hidden channels and vocabulary are the model's. What each layer ranks by itself (heads, neurons,
    experts) is ranked by the layer's own weights: no text passes through it while the model is scored.

    Args:
        checkpoint: the source.
        cut: how the model was cut.
        rank: ranks their units.
        keep: kept units of what each layer ranks by itself; None: the strongest.

    Raises:
        ValueError: no table describes them, one is missing, or one has another shape than the table says.
    """

    def __init__(
        self, checkpoint: Checkpoint, cut: Cut, rank: Rank, keep: Keep | None = None
    ) -> None:
        self._checkpoint, self._cut = checkpoint, cut
        self.layers = described(checkpoint)
        stored = checkpoint.predictions
        behind = cut.before["layers"]
        inner = {self.layers.inner_name(name, behind): name for name in stored}
        model = self.layers.architecture
        if keep is None:
            keep = self._strongest(inner, rank)
        shared = {
            axis: units for axis, units in cut.keep.items() if not model.family.ranked_per(axis)
        }
        alone = Cut(model, shared | keep, tuple(range(model.sizes["layers"])))
        self._pieces: dict[str, tuple[str, Piece]] = {}
        for piece in pieces(alone, list(inner)):
            name = self.layers.stored_name(piece.name, cut.after["layers"])
            self._pieces[name] = inner[piece.source], piece

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Tensor name on disk to dtype and shape in the result."""
        return {
            name: replace(self._checkpoint.predictions[stored], shape=piece.shape)
            for name, (stored, piece) in self._pieces.items()
        }

    @property
    def config(self) -> dict[str, Any]:
        """Entries of config.json that count them."""
        given, family = self._checkpoint.config, self._checkpoint.family
        return {key: given[key] for key in family.mtp_layers if key in given}

    @property
    def beginnings(self) -> tuple[str, ...]:
        """What the names of their tensors in the result begin with, as transformers names them, too."""
        family, first = self._checkpoint.family, self._cut.after["layers"]
        numbers = range(first, first + self.layers.architecture.sizes["layers"])
        every = {fill(text, {family.layer: number}) for text in family.mtp for number in numbers}
        return tuple(sorted(every))

    def read(self, name: str) -> Tensor:
        """One tensor of the result."""
        stored, piece = self._pieces[name]
        return cut_tensor(self._read(stored), piece, self.layers.architecture.sizes)

    def _read(self, stored: str) -> Tensor:
        return read_entry(self._checkpoint.folder, self._checkpoint.predictions[stored], stored)

    def _strongest(self, inner: Mapping[str, str], rank: Rank) -> Keep:
        model = self.layers.architecture
        widths = {
            axis: self._cut.after[axis]
            for axis in model.prunable
            if axis != "layers" and model.family.ranked_per(axis)
        }
        if all(size == model.sizes[axis] for axis, size in widths.items()):
            return {}
        scores = rank(model, list(inner), lambda name: self._read(inner[name]))
        return select_units(model.family, scores, model.sizes, {**model.sizes, **widths})


def described(checkpoint: Checkpoint) -> PredictionLayers:
    """A checkpoint's prediction layers as its family's table describes them.

    Raises:
        ValueError: it does not; one is missing, or has another shape.
    """
    found = prediction_layers(checkpoint.architecture, checkpoint.predictions)
    if found is None:
        raise ValueError(
            f"no table of {checkpoint.family.model_type} describes what they hold; use drop"
        )
    layers = checkpoint.architecture.sizes["layers"]
    shapes = {name: shape for name, _, shape in found.architecture.tensors()}
    for name, entry in checkpoint.predictions.items():
        expected = shapes[found.inner_name(name, layers)]
        if entry.shape != expected:
            raise ValueError(
                f"{checkpoint.folder}: {name}: config.json implies shape {list(expected)}, the file holds "
                f"{list(entry.shape)}"
            )
    return found


def keeps_predictions(checkpoint: Checkpoint, how: str | None) -> bool:
    """Whether prediction layers (MTP) are cut along.

    Args:
        checkpoint: the source.
        how: ``plan.mtp``.

    Raises:
        ValueError: they are to be, and cannot be.
    """
    names = list(checkpoint.predictions)
    if how != "keep" or not names:
        return False
    try:
        described(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"plan.mtp=keep: {checkpoint.folder}: the {len(names)} tensors of prediction layers, as "
            f"{plain(names[0], 120)}, cannot be cut along: {error}"
        ) from error
    return True
