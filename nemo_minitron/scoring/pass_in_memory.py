"""A scoring pass over a model in memory, and the loss without layers."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.data.ahead import ahead
from nemo_minitron.data.calibration_samples import Batch, Samples
from nemo_minitron.families import Family
from nemo_minitron.losses.fused_linear_loss import cross_entropy
from nemo_minitron.losses.wide_matmul import widened
from nemo_minitron.models.causal_lm import decoder_of, free, frozen, hidden_states, projection_of
from nemo_minitron.models.layer_control import LayerControl
from nemo_minitron.scoring.calibration_sums import CalibrationSums
from nemo_minitron.scoring.depth import DepthSums
from nemo_minitron.scoring.hooks import Measures, Recorder

Block = tuple[int, ...]
"""Layers that are left out together, ascending."""
Report = Callable[[Callable[[], CalibrationSums], int], None]
"""Called with a function that gives the sums so far, and with the tokens that were read since."""


def blocks_of(layers: int, length: int, removed: frozenset[int]) -> list[Block]:
    """All blocks of consecutive layers of one length, without those that hold a removed layer."""
    every = [tuple(range(first, first + length)) for first in range(layers - length + 1)]
    return [block for block in every if not removed & set(block)]


def loss_sum(
    model: Any, family: Family, hidden_BSH: Tensor, labels_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats summed over the labels that count, float64, and their number: two scalars.

    Args:
        model: the causal LM.
        family: its table.
        hidden_BSH: what ``hidden_states`` gives.
        labels_BS: ids of the next tokens, -1 where none counts.
    """
    terms = cross_entropy(
        projection_of(model, family, hidden_BSH.flatten(0, 1)), labels_BS.flatten()
    )
    mean = widened(terms.ce)
    count = (labels_BS >= 0).sum().to(mean.device)
    return mean * count, count


def check_isolation(model: Any, family: Family) -> None:
    """Tries whether packed documents see each other, and refuses the model if they do.

    Attention is kept inside documents by transformers where a family hands on its position ids; one
    that does not, and recurrent layers, would leak without a word.

    Raises:
        ValueError: two short documents in one sample come out otherwise than apart.
    """
    decoder, device = decoder_of(model, family), next(model.parameters()).device
    ids_BS = torch.arange(2, 18, device=device)[None] % model.config.vocab_size
    positions_BS = torch.arange(8, device=device).repeat(2)[None]
    with frozen(model):
        packed_BSH = decoder(
            input_ids=ids_BS, position_ids=positions_BS, use_cache=False
        ).last_hidden_state
        alone_BSH = decoder(input_ids=ids_BS[:, 8:], use_cache=False).last_hidden_state
    tolerance = 1e-3 if packed_BSH.dtype == torch.float32 else 3e-2
    if not torch.allclose(
        packed_BSH[:, 8:], alone_BSH, atol=tolerance * float(alone_BSH.abs().max())
    ):
        raise ValueError(
            f"data.calibration.packing=documents: in {family.model_type}, as the installed transformers "
            "computes it, one document sees another; use off (one document per sample) or plain"
        )


class Losses:
    """Sums of the loss of a whole model and of it without each of some blocks."""

    def __init__(self, layers: int, lengths: Sequence[int], removed: frozenset[int]) -> None:
        self.layers, self.lengths = layers, lengths
        self.blocks = [block for length in lengths for block in blocks_of(layers, length, removed)]
        zero = torch.zeros((), dtype=torch.float64)
        self._sums: dict[Block | None, Tensor] = dict.fromkeys([None, *self.blocks], zero)
        self._count = self._next_count = torch.zeros((), dtype=torch.int64)
        self.discard()

    def add(self, block: Block | None, loss: tuple[Tensor, Tensor]) -> None:
        """A batch's loss without a block; None: of the whole model. It waits for ``keep``."""
        known = self._sums[block]
        self._next[block] = (known if known.device == loss[0].device else known.to(loss[0])) + loss[
            0
        ]
        if block is None:
            self._next_count = loss[1] + self._count

    def keep(self) -> None:
        """Adds what waits."""
        self._sums |= self._next
        self._count = self._next_count
        self.discard()

    def discard(self) -> None:
        """Forgets it: the batch comes again."""
        self._next: dict[Block | None, Tensor] = {}
        self._next_count = self._count

    def depth(self) -> dict[tuple[str, int], DepthSums]:
        """The sums by block length; infinite for blocks that were not measured."""
        result = {}
        read = {block: float(loss) for block, loss in self._sums.items()}
        for length in self.lengths:
            total = torch.full((self.layers - length + 1,), torch.inf, dtype=torch.float64)
            for block in self.blocks:
                if len(block) == length:
                    total[block[0]] = read[block]
            result["lm_loss", length] = DepthSums(total, read[None], int(self._count))
        return result


def losses_without(
    model: Any,
    family: Family,
    detour: LayerControl,
    batch: Batch,
    losses: Losses,
    removed: frozenset[int],
) -> None:
    """Loss of one batch without each block: only the layers behind the block run again ([P2] section 3).

    The forward pass of the whole model has just been made, with ``detour.catch``.
    """
    inputs = list(detour.inputs)
    detour.catch = False
    for block in losses.blocks:
        start = inputs[block[0]]
        assert start is not None
        detour.skip = frozenset(range(block[0])) | set(block) | removed
        detour.inject = {0: start}
        hidden_BSH = hidden_states(model, family, **batch.arguments())
        losses.add(block, loss_sum(model, family, hidden_BSH, batch.labels_BS))
    detour.skip, detour.inject, detour.inputs = removed, {}, [None] * len(inputs)


def in_memory(
    model: Any,
    checkpoint: Checkpoint,
    samples: Samples,
    groups: Sequence[Sequence[int]],
    measures: Measures,
    removed: frozenset[int] = frozenset(),
    idle: int = 0,
    report: Report = lambda *_: None,
) -> CalibrationSums:
    """One pass: every axis, block influence, and the loss without layers, batch after batch.

    Args:
        model: the causal LM, on the device that computes.
        checkpoint: where it came from.
        samples: the calibration samples.
        groups: numbers of the samples of each batch.
        measures: what to sum.
        removed: layers that are left out all along.
        idle: forward passes at the end that count for nothing: every rank of a sharded model must
            make as many as the others.
        report: called after each batch.
    """
    one = _Pass(model, checkpoint, measures, removed)
    device = next(model.parameters()).device
    done: dict[int, str] = {}
    fingerprints = samples.fingerprints()

    def sums() -> CalibrationSums:
        if not done:
            return CalibrationSums()
        found = one.recorder.sums()
        return replace(found, depth={**found.depth, **one.losses.depth()}, samples=dict(done))

    if samples.positions_NS is not None:
        check_isolation(model, checkpoint.family)
    with (
        frozen(model),
        one.detour.attached(),
        one.recorder.attached(model),
        closing(ahead(samples.batches(groups, device))) as batches,
    ):
        for group, batch in batches:
            one.take(batch, device)
            done |= {index: fingerprints[index] for index in group}
            report(sums, batch.tokens_BS.numel())
        one.recorder.idle = True
        for _ in range(idle):
            one.read(samples.batch([0]).to(device))
            one.discard()
    return sums()


class _Pass:
    """A model that batches are taken through, and what they add up to."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, measures: Measures, removed: frozenset[int]
    ) -> None:
        family, layers = checkpoint.family, checkpoint.architecture.sizes["layers"]
        self.model, self.removed = model, removed
        self.recorder = Recorder(checkpoint.architecture, measures)
        self.losses = Losses(layers, measures.losses, removed)
        self.detour = LayerControl(model, family)
        self._most = sys.maxsize
        # of a model that is sharded over ranks all must make the same forward passes; those weights that
        # it does not lay apart again after a pass are whole
        self._divides = not any(hasattr(weight, "full_tensor") for weight in model.parameters())

    def take(self, batch: Batch, device: torch.device) -> None:
        """Takes a batch through the model; in halves where memory runs out, and so all that follow."""
        start, samples = 0, len(batch.tokens_BS)
        while start < samples:
            stop = min(start + self._most, samples)
            if self._fits(batch.part(start, stop).to(device)):
                start = stop
                continue
            self._most = (stop - start + 1) // 2
            free()
            print(
                f"score.batch_size: memory does not suffice for {stop - start} samples at once; "
                f"it continues with {self._most}",
                flush=True,
            )

    def _fits(self, batch: Batch) -> bool:
        """Takes a batch that is on the device through the model, all of it or, out of memory, nothing."""
        try:
            self.read(batch)
            self.recorder.keep()
            self.losses.keep()
        except torch.OutOfMemoryError:
            if not self._divides or len(batch.tokens_BS) == 1:
                raise
            self.discard()
            return False
        return True

    def discard(self) -> None:
        """Forgets what the last batch has shown."""
        self.recorder.discard()
        self.losses.discard()
        self.detour.inputs, self.detour.output = [None] * len(self.detour.inputs), None

    def read(self, batch: Batch) -> None:
        """Takes one batch through the model, recorded, and through it without each block."""
        recorder, detour = self.recorder, self.detour
        family = recorder.family
        recorder.mask, recorder.text_B = batch.mask_BS, batch.text_B
        recorder.paused = recorder.idle
        detour.skip, detour.inject, detour.catch = self.removed, {}, bool(self.losses.blocks)
        if not self.losses.blocks:
            decoder_of(self.model, family)(**batch.inputs())
            return
        hidden_BSH = hidden_states(self.model, family, **batch.arguments())
        self.losses.add(None, loss_sum(self.model, family, hidden_BSH, batch.labels_BS))
        recorder.paused = True
        losses_without(self.model, family, detour, batch, self.losses, self.removed)
