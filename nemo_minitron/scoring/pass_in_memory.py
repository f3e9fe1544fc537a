"""A scoring pass over a model in memory, and the loss without layers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.data.calibration_samples import Batch, Samples
from nemo_minitron.families import Family
from nemo_minitron.losses.fused_linear_loss import cross_entropy
from nemo_minitron.models.causal_lm import decoder_of, frozen, hidden_states, projection_of
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
) -> tuple[float, int]:
    """Cross-entropy in nats summed over the labels that count, and their number.

    Args:
        model: the causal LM.
        family: its table.
        hidden_BSH: what ``hidden_states`` gives.
        labels_BS: ids of the next tokens, -1 where none counts.
    """
    terms = cross_entropy(
        projection_of(model, family, hidden_BSH.flatten(0, 1)), labels_BS.flatten()
    )
    count = int((labels_BS >= 0).sum())
    return float(terms.ce) * count, count


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
        self.without = dict.fromkeys(self.blocks, 0.0)
        self.base, self.count = 0.0, 0

    def add(self, block: Block | None, loss: tuple[float, int]) -> None:
        """Adds a batch's loss without a block; None: of the whole model."""
        if block is None:
            self.base, self.count = self.base + loss[0], self.count + loss[1]
        else:
            self.without[block] += loss[0]

    def depth(self) -> dict[tuple[str, int], DepthSums]:
        """The sums by block length; infinite for blocks that were not measured."""
        result = {}
        for length in self.lengths:
            total = torch.full((self.layers - length + 1,), torch.inf, dtype=torch.float64)
            for block, loss in self.without.items():
                if len(block) == length:
                    total[block[0]] = loss
            result["lm_loss", length] = DepthSums(total, self.base, self.count)
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
    family, layers = checkpoint.family, checkpoint.architecture.sizes["layers"]
    recorder = Recorder(checkpoint.architecture, measures)
    losses = Losses(layers, measures.losses, removed)
    device = next(model.parameters()).device
    detour = LayerControl(model, family)
    detour.skip = removed
    done: dict[int, str] = {}
    fingerprints = samples.fingerprints()

    def sums() -> CalibrationSums:
        if not done:
            return CalibrationSums()
        found = recorder.sums()
        return replace(found, depth={**found.depth, **losses.depth()}, samples=dict(done))

    if samples.positions_NS is not None:
        check_isolation(model, family)
    with frozen(model), detour.attached(), recorder.attached(model):
        for group in groups:
            batch = samples.batch(group).to(device)
            _read(model, recorder, detour, batch, losses, removed)
            recorder.keep()
            done |= {index: fingerprints[index] for index in group}
            report(sums, batch.tokens_BS.numel())
        recorder.idle = True
        for _ in range(idle):
            uncounted = Losses(layers, measures.losses, removed)
            _read(model, recorder, detour, samples.batch([0]).to(device), uncounted, removed)
    return sums()


def _read(
    model: Any,
    recorder: Recorder,
    detour: LayerControl,
    batch: Batch,
    losses: Losses,
    removed: frozenset[int],
) -> None:
    """Takes one batch through the model, recorded, and through it without each block."""
    family = recorder.family
    recorder.mask, recorder.paused = batch.mask_BS, recorder.idle
    if not losses.blocks:
        decoder_of(model, family)(**batch.inputs())
        return
    detour.catch = True
    hidden_BSH = hidden_states(model, family, **batch.arguments())
    losses.add(None, loss_sum(model, family, hidden_BSH, batch.labels_BS))
    recorder.paused = True
    losses_without(model, family, detour, batch, losses, removed)
