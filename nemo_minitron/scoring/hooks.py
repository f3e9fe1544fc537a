"""torch hooks: sums the activations at a family's taps while a model runs forward."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nemo_minitron.families import Architecture, Tap, find_row
from nemo_minitron.families.grammar import Dim, extent, segments
from nemo_minitron.models.module_hooks import on_tap
from nemo_minitron.models.routed_experts import Visit, watched
from nemo_minitron.scoring.calibration_sums import CalibrationSums
from nemo_minitron.scoring.depth import DepthSums, cosines
from nemo_minitron.scoring.fused import kernels_for
from nemo_minitron.scoring.importance import OWN_TOKENS, Moments, over_routed, over_sequence
from nemo_minitron.scoring.running_sums import RunningSums

_BY_TEXT = "experts of each text"
"""What counts of [texts, experts] wait under beside those of the axis."""


@dataclass(frozen=True)
class Measures:
    """What a scoring pass sums.

    Attributes:
        sequence: aggregations over positions.
        pre_activation: whether neurons are read before their activation function, where the family
            says how.
        influence: lengths of the blocks of layers whose influence is measured.
        losses: lengths of the blocks without which the loss is measured.
        own_tokens: whether experts are summed over their own tokens, too.
        texts: texts of a mixture for each of which the tokens of every expert are counted; 0: not.
    """

    sequence: tuple[str, ...] = ("mean",)
    pre_activation: bool = False
    influence: tuple[int, ...] = (1,)
    losses: tuple[int, ...] = ()
    own_tokens: bool = False
    texts: int = 0


class Recorder:
    """Sums of a forward pass over calibration samples, for every tapped axis.

    What a forward pass shows waits until ``keep`` adds it, or ``discard`` forgets it. No hook waits
    for the device: none reads a number from it, and none selects by a mask.

    Attributes:
        mask: positions that count in the coming forward pass, Tensor of shape [samples, positions],
            or None for all.
        text_B: number of each sample's text in the coming forward pass, or None.
        paused: whether the coming forward pass goes unrecorded.
        idle: whether all do from now on.
    """

    def __init__(
        self,
        architecture: Architecture,
        measures: Measures,
        only: Sequence[int] | None = None,
    ) -> None:
        """Prepares the sums.

        Args:
            architecture: the model's table and its config.json.
            measures: what to sum.
            only: layers to watch; None: all.
        """
        family = self.family = architecture.family
        self.sizes = architecture.sizes
        self.measures = measures
        present = architecture.present
        watch = range(self.sizes["layers"]) if only is None else only
        self.layers = list(watch)
        where = {
            axis: [layer for layer in self._where(axis, present) if layer in watch]
            for axis in family.taps
            if axis != "layers" and axis in present and measures.sequence
        }
        self.places = {axis: layers for axis, layers in where.items() if layers}
        self.mask: Tensor | None = None
        self.text_B: Tensor | None = None
        self.paused = self.idle = False
        self._sums = RunningSums()
        self._inputs: dict[int, Tensor] = {}
        self._samples_positions = torch.Size()
        self._now: dict[str, dict[str, list[Tensor]]] = {}
        self._came: list[Tensor] = []
        self._came_B: list[Tensor] = []

    def keep(self) -> None:
        """Adds what the forward passes since the last time have shown."""
        self._inputs = {}
        self._sums.keep(self.mask, self._samples_positions[1] if self._samples_positions else 0)

    def discard(self) -> None:
        """Forgets it: the batch comes again."""
        self._inputs = {}
        self._sums.discard()

    def _where(self, axis: str, present: Mapping[str, list[int]]) -> Sequence[int]:
        return (
            range(self.sizes["layers"])
            if self.family.axes[axis].scope == "model"
            else present[axis]
        )

    def _hows(self, axis: str) -> tuple[str, ...]:
        own = self.measures.own_tokens and axis == "experts"
        return (*self.measures.sequence, OWN_TOKENS) if own else self.measures.sequence

    def _taps(self, axis: str) -> tuple[Tap, ...]:
        early = f"{axis}.pre_activation"
        if self.measures.pre_activation and early in self.family.taps:
            return self.family.taps[early]
        return self.family.taps[axis]

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Hooks the model for the length of the block."""
        handles = []
        index = self.family.layer
        routed: dict[str, list[str]] = {}
        for tap in self.family.taps["layers"]:
            side = self._enter if tap.side == "input" else self._leave
            for layer in self.layers:
                handles.append(on_tap(model, tap.at(index, layer), partial(side, layer)))
        for axis, layers in self.places.items():
            for number, tap in enumerate(self._taps(axis)):
                for layer in layers:
                    here = tap.at(index, layer)
                    if tap.side == "experts":
                        routed.setdefault(here.module, []).append(axis)
                        continue
                    record = partial(self._record, axis, number, layer, self._dim(here, axis))
                    handles.append(on_tap(model, here, record))
        visits = {
            path: partial(self._visit, layer, axes)
            for layer in self.layers
            for path, axes in routed.items()
            if path in {t.at(index, layer).module for axis in axes for t in self._taps(axis)}
        }
        try:
            with watched(model, visits):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _dim(self, tap: Tap, axis: str) -> Dim:
        """The axes along the tapped activation's last dimension: the tap's, or the module's weight's."""
        if tap.dim is not None:
            return tap.dim
        found = find_row(self.family, f"{tap.module}.weight")
        assert found is not None, tap.module
        dim = found[0].dims[-1 if tap.side == "input" else 0]
        assert any(axis in product for product in dim), (tap.module, axis, dim)
        return dim

    def _record(self, axis: str, tap: int, layer: int, dim: Dim, x_BSU: Tensor) -> None:
        if self.paused:
            return
        if x_BSU.dim() == 2:  # some modules get their tokens as one list
            x_BSU = x_BSU.unflatten(0, self._samples_positions)
        value_BSU = self._units(axis, dim, x_BSU)
        fused = kernels_for(value_BSU)
        read = over_sequence if fused is None else fused.sequence_sums
        for how, value in read(value_BSU, self.mask, self.measures.sequence).items():
            self._sums.add((axis, how), (layer, tap), value, partial=fused is not None)

    def _units(self, axis: str, dim: Dim, x_BSU: Tensor) -> Tensor:
        """One number per unit: where a unit is a vector (a head), its L2 norm ([P1] section 2.2)."""
        if dim == ((axis,),):
            return x_BSU
        parts = []
        for product, start, width in segments(dim, self.sizes):
            if axis in product:
                opened = x_BSU.narrow(-1, start, width).unflatten(
                    -1, [extent(name, self.sizes) for name in product]
                )
                others = [2 + i for i, name in enumerate(product) if name != axis]
                parts.append(
                    torch.linalg.vector_norm(opened, dim=others, dtype=torch.float32)
                    if others
                    else opened
                )
        if len(parts) == 1:
            only: Tensor = parts[0]
            return only
        whole: Tensor = torch.linalg.vector_norm(torch.stack(parts).float(), dim=0)
        return whole

    def _visit(self, layer: int, axes: Sequence[str], visit: Visit) -> None:
        """Sums what one expert did: its neurons, and the norm of what it gave, weighted by its router."""
        if self.paused:
            return
        samples, positions = self._samples_positions
        if visit.expert == 0:
            self._now = {axis: {how: [] for how in self._hows(axis)} for axis in axes}
            self._came, self._came_B = [], []
        sample_T = visit.token_T // positions
        if self.mask is not None:
            valid_T = self.mask.flatten()[visit.token_T]
            sample_T = sample_T.where(valid_T, sample_T.new_full((), samples))
            self._came.append(valid_T.sum())
            count_B = self.mask.sum(1)
        else:
            self._came.append(torch.full((), len(sample_T), device=sample_T.device))
            count_B = torch.full((samples,), positions, device=sample_T.device)
        if self._apart():
            zero_B = sample_T.new_zeros(samples + 1)  # the last: tokens that do not count
            self._came_B.append(zero_B.index_add(0, sample_T, torch.ones_like(sample_T)))
        for axis in axes:
            if axis == "experts":
                x_TU = torch.linalg.vector_norm(
                    visit.weighted_TH, dim=-1, keepdim=True, dtype=torch.float32
                )
            else:
                x_TU = visit.neurons_TU
            for how, value_BU in over_routed(x_TU, sample_T, count_B, self._hows(axis)).items():
                self._now[axis][how].append(value_BU)
        if visit.expert == visit.experts - 1:
            self._all_visited(layer)

    def _all_visited(self, layer: int) -> None:
        """Hands on what all experts of a layer did."""
        self._sums.add_routed("experts", layer, torch.stack(self._came))
        if self._apart():
            assert self.text_B is not None
            came_BE = torch.stack(self._came_B, 1)[:-1]
            zero_ME = came_BE.new_zeros(self.measures.texts, came_BE.shape[1])
            self._sums.add_routed(_BY_TEXT, layer, zero_ME.index_add(0, self.text_B, came_BE))
        for axis, hows in self._now.items():
            for how, values in hows.items():
                value_BEU = torch.stack(values, 1)
                value_BEU = value_BEU[..., 0] if axis == "experts" else value_BEU
                self._sums.add((axis, how), (layer, 0), value_BEU)

    def _apart(self) -> bool:
        return self.measures.texts > 0 and self.text_B is not None

    def _enter(self, layer: int, x_BSH: Tensor) -> None:
        self._samples_positions = x_BSH.shape[:2]
        if not self.paused:
            self._inputs[layer] = x_BSH

    def _leave(self, layer: int, x_BSH: Tensor) -> None:
        if self.paused:
            return
        for length in self.measures.influence:
            first = layer - length + 1
            if first in self._inputs:
                before_BSH = self._inputs[first]
                fused = kernels_for(before_BSH)
                read = cosines if fused is None else fused.cosines
                self._sums.add_cosines((first, length), read(before_BSH, x_BSH))
        for old in [
            old
            for old in self._inputs
            if old <= layer + 1 - max(self.measures.influence, default=1)
        ]:
            del self._inputs[old]

    def sums(self) -> CalibrationSums:
        """The sums of all layers, on the CPU; the caller adds the samples' fingerprints."""
        self.keep()
        sums: dict[tuple[str, str], Moments] = {}
        for axis, layers in self.places.items():
            for how in self._hows(axis):
                sums[axis, how] = self._stacked(axis, how, layers)
        routed: dict[str, Tensor] = {}
        for (axis, layer), counts in self._sums.routed().items():
            shape = (self.sizes["layers"], *counts.shape)
            routed.setdefault(axis, torch.zeros(shape, dtype=torch.int64))
            routed[axis][layer] = counts
        by_text = routed.pop(_BY_TEXT).transpose(0, 1) if _BY_TEXT in routed else None
        depth: dict[tuple[str, int], DepthSums] = {}
        found, tokens = self._sums.cosines(), int(self._sums.tokens)
        for length in self.measures.influence:
            total = torch.zeros(self.sizes["layers"] - length + 1, dtype=torch.float64)
            for (first, long), cosine in found.items():
                if long == length:
                    total[first] = cosine
            measured = any(long == length for _, long in found)
            depth["block_influence", length] = DepthSums(total, 0.0, tokens if measured else 0)
        return CalibrationSums(sums, routed, depth, by_text=by_text)

    def _stacked(self, axis: str, how: str, layers: Sequence[int]) -> Moments:
        whole = self.family.axes[axis].scope == "model"
        taps = len(self._taps(axis)) if whole else 1
        found, samples = self._sums.moments((axis, how))
        assert len(found) == taps * len(layers), (
            f"{len(found)} of {taps * len(layers)} taps of {axis} got activations"
        )
        units = next(iter(found.values()))[0].shape
        shape = (self.sizes["layers"], taps, *units)
        total, squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        for place, one in found.items():
            total[place], squares[place] = one
        return (
            Moments(samples, total, squares)
            if whole
            else Moments(samples, total[:, 0], squares[:, 0])
        )
