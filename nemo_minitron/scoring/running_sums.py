"""Sums of a pass on the device that computes, to which a batch is added whole or not at all.

Nothing here waits for the device: what a batch found waits there as it is, is added at the batch's
end, all places of an axis together, and comes to the CPU when the sums are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.losses.wide_matmul import sum_dtype, widened
from nemo_minitron.scoring.importance import Moments, finished, moments

Key = tuple[str, str]
"""Axis and aggregation over positions."""
Place = tuple[int, int]
"""Layer, and number of the tap in it."""

CHUNK_BYTES = 64 * 2**20
"""Of the values of one batch so much is widened to float64 at a time."""


@dataclass
class _Known:
    """Moments of one axis and aggregation, [places, ..., units]; the places in ascending order."""

    places: list[Place]
    total: Tensor
    squares: Tensor
    samples: int = 0


class RunningSums:
    """Moments, cosines and counts of routed tokens over all batches that were kept.

    Attributes:
        tokens: valid positions of all batches; on the device until it is read.
    """

    def __init__(self) -> None:
        self._known: dict[Key, _Known] = {}
        self._cosines: dict[Place, Tensor] = {}
        self._routed: dict[tuple[str, int], Tensor] = {}
        self.tokens: int | Tensor = 0
        self.discard()

    def discard(self) -> None:
        """Forgets what waits: the batch ran out of memory, and comes again in parts."""
        self._values: dict[tuple[Key, bool], dict[Place, Tensor]] = {}
        self._angles: dict[Place, Tensor] = {}
        self._came: dict[tuple[str, int], Tensor] = {}

    def add(self, key: Key, place: Place, value: Tensor, partial: bool = False) -> None:
        """One place's values of each sample: [samples, ..., units].

        Where ``partial`` is set, [samples, parts, units]: sums that ``importance.finished`` ends.
        """
        self._values.setdefault((key, partial), {})[place] = value

    def add_cosines(self, block: Place, cosine_BS: Tensor) -> None:
        """Cosines of a block of layers (its first layer, its length)."""
        self._angles[block] = cosine_BS

    def add_routed(self, axis: str, layer: int, count_E: Tensor) -> None:
        """Tokens that came to each unit of a layer, int64."""
        self._came[axis, layer] = count_E

    def keep(self, mask_BS: Tensor | None, positions: int) -> None:
        """Adds what waits.

        Args:
            mask_BS: the batch's valid positions; None: all.
            positions: positions of each sample.
        """
        if not (self._values or self._angles or self._came):
            return
        count = positions if mask_BS is None else mask_BS.sum(1, keepdim=True).clamp(min=1)
        ready = [
            (self._place(key, partial, values), list(self._moments(key[1], partial, values, count)))
            for (key, partial), values in self._values.items()
        ]
        cosines, tokens = self._cosine_sums(mask_BS)
        cosines = {block: self._cosines.get(block, 0) + one for block, one in cosines.items()}
        routed = {where: self._routed.get(where, 0) + one for where, one in self._came.items()}
        tokens = self.tokens + tokens
        # from here on nothing is allocated: a batch that runs out of memory has added nothing
        for known, parts in ready:
            for part, found in parts:
                known.total[part].add_(found.total)
                known.squares[part].add_(found.squares)
            known.samples += parts[0][1].samples
        self._cosines.update(cosines)
        self._routed.update(routed)
        self.tokens = tokens
        self.discard()

    def _place(self, key: Key, partial: bool, found: dict[Place, Tensor]) -> _Known:
        """Where the moments of an axis are summed; made at its first batch."""
        places, first = sorted(found), next(iter(found.values()))
        if key not in self._known:
            units = first.shape[2:] if partial else first.shape[1:]
            wide = sum_dtype(first.device) == torch.float64
            home = first.device if wide else torch.device("cpu")
            zeros = [
                torch.zeros(len(places), *units, dtype=torch.float64, device=home) for _ in range(2)
            ]
            self._known[key] = _Known(places, zeros[0], zeros[1])
        known = self._known[key]
        assert known.places == places, (key, known.places, places)
        return known

    def _moments(
        self, how: str, partial: bool, found: dict[Place, Tensor], count: int | Tensor
    ) -> Iterator[tuple[slice, Moments]]:
        """Moments of the batch, some places at a time: a handful of kernels, not one for each place."""
        values = [found[place] for place in sorted(found)]
        # the CPU gains nothing from a copy
        step = (
            1 if values[0].device.type == "cpu" else max(1, CHUNK_BYTES // (8 * values[0].numel()))
        )
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            if step == 1 and not partial:
                one = moments(values[start])
                yield part, one
                continue
            value_PBU = torch.stack(values[part])
            value_PBU = finished(value_PBU, how, count) if partial else value_PBU
            yield part, moments(value_PBU.transpose(0, 1))

    def _cosine_sums(self, mask_BS: Tensor | None) -> tuple[dict[Place, Tensor], int | Tensor]:
        """Each block's sum of cosines over valid positions, and how many these are."""
        if not self._angles:
            return {}, 0
        stack_PBS = torch.stack(list(self._angles.values()))
        tokens: int | Tensor = stack_PBS[0].numel()
        if mask_BS is not None:
            # not by multiplication: what padding gives need not be a number
            stack_PBS = stack_PBS.where(mask_BS, stack_PBS.new_zeros(()))
            tokens = mask_BS.sum()
        return dict(zip(self._angles, widened(stack_PBS).sum((1, 2)), strict=True)), tokens

    def moments(self, key: Key) -> tuple[dict[Place, tuple[Tensor, Tensor]], int]:
        """Total and squares of each place, on the CPU, and the number of samples."""
        if key not in self._known:
            return {}, 0
        known = self._known[key]
        rows = zip(known.total.cpu(), known.squares.cpu(), strict=True)
        return dict(zip(known.places, rows, strict=True)), known.samples

    def cosines(self) -> dict[Place, float]:
        """Sum of the cosines of each block (its first layer, its length)."""
        totals = list(self._cosines.values())
        read = torch.stack(totals).tolist() if totals else []
        return dict(zip(self._cosines, read, strict=True))

    def routed(self) -> dict[tuple[str, int], Tensor]:
        """Tokens that came to each unit of a layer (axis, layer), on the CPU."""
        return {where: count_E.cpu() for where, count_E in self._routed.items()}
