"""A scoring pass over a model that does not fit into memory: one decoder layer at a time, over all batches.

A layer is loaded as a causal LM of its own, cut out of the checkpoint by the family's table as a
depth cut
would: transformers does what it does for any model (renamed and fused tensors, masks, rope), and no
family needs code here. Embedding, final norm and head stay in memory, every byte of the checkpoint
is read once. The hidden states of all batches wait between two layers in memory, and beyond a
budget on disk.
"""

import json
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint, load_tensor
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.data.ahead import ahead
from nemo_minitron.data.calibration_samples import Batch, Samples
from nemo_minitron.families import Architecture
from nemo_minitron.models.causal_lm import decoder_of, frozen, hidden_states, load_layers
from nemo_minitron.models.free_memory import available_bytes
from nemo_minitron.models.layer_control import LayerControl
from nemo_minitron.pruning.slice import Cut, pieces
from nemo_minitron.scoring.calibration_sums import CalibrationSums, place
from nemo_minitron.scoring.hidden_state_store import HiddenStateStore
from nemo_minitron.scoring.hooks import Measures, Recorder
from nemo_minitron.scoring.importance import Moments, merge
from nemo_minitron.scoring.layerwise_checkpoint import LayerwiseCheckpoint
from nemo_minitron.scoring.pass_in_memory import Block, Losses, check_isolation, loss_sum


def layer_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of the weights outside of the layers, and of the largest layer."""
    placeholder = checkpoint.family.layer
    outside, layers = 0, [0] * checkpoint.architecture.sizes["layers"]
    for name, entry in checkpoint.entries.items():
        units = checkpoint.units(name)
        if placeholder in units:
            layers[units[placeholder]] += entry.size
        else:
            outside += entry.size
    return outside, max(layers)


@dataclass(frozen=True)
class _Weights:
    """A layer, the layers of the model that it is loaded in, that model, and its weights."""

    layer: int
    layers: tuple[int, ...]
    architecture: Architecture
    tensors: dict[str, Tensor]


class _OneLayer:
    """Loads one layer at a time as a model of its own."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, folder: Path) -> None:
        self.checkpoint, self.device, self.folder = checkpoint, device, folder
        self.present = checkpoint.architecture.present
        self._kept: dict[str, Tensor] = {}

    def reads(self, layers: Sequence[int]) -> Iterator[_Weights]:
        """The weights of one layer after the other, each in memory of its own."""
        for layer in layers:
            yield self._read(layer)

    def _read(self, layer: int) -> _Weights:
        family = self.checkpoint.family
        company = {
            self.present[axis][0]
            for axis in family.needs
            if axis in self.present and layer not in self.present[axis]
        }  # layers without which the architecture does not run; they are left out of the computation
        layers = tuple(sorted({layer, *company}))
        cut = Cut(self.checkpoint.architecture, {}, layers)
        tensors = {}
        placeholder = family.layer
        for piece in pieces(cut, list(self.checkpoint.entries)):
            units = self.checkpoint.units(piece.source)
            stays = placeholder not in units or units[placeholder] in company
            if piece.source in self._kept:
                tensors[piece.name] = self._kept[piece.source]
                continue
            read = load_tensor(self.checkpoint, piece.source)
            tensors[piece.name] = read.pin_memory() if self.device.type == "cuda" else read
            if stays:
                self._kept[piece.source] = tensors[piece.name]
        return _Weights(layer, layers, cut.result, tensors)

    @contextmanager
    def loaded(self, weights: _Weights) -> Iterator[tuple[Any, LayerControl, int]]:
        """The model of a layer's weights, control over its layers, and the layer's number in it."""
        family, layers = self.checkpoint.family, weights.layers
        config = both_spellings(weights.architecture.config)
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = load_layers(self.folder, family, weights.tensors)
        weights.tensors.clear()
        model = model.to(self.device, non_blocking=self.device.type == "cuda")
        detour = LayerControl(model, family)
        here = layers.index(weights.layer)
        detour.skip = frozenset(range(len(layers))) - {here}
        try:
            with frozen(model), detour.attached():
                yield model, detour, here
        finally:
            # hooks and modules refer to each other, until somebody looks for garbage: the weights go now
            model.to_empty(device="meta")


def streamed(
    checkpoint: Checkpoint,
    samples: Samples,
    groups: Sequence[Sequence[int]],
    measures: Measures,
    device: torch.device,
    budget: int,
    spill: Path,
    removed: frozenset[int] = frozenset(),
    progress: Callable[[int], None] = lambda _: None,
    savings: LayerwiseCheckpoint | None = None,
) -> CalibrationSums:
    """The same sums as ``in_memory``, with one layer in memory at a time.

    Args:
        checkpoint: the model.
        samples: the calibration samples.
        groups: numbers of the samples of each batch.
        measures: what to sum; of block influence, single layers only.
        device: where a layer computes.
        budget: bytes of hidden states kept in memory.
        spill: an existing folder, for the hidden states beyond.
        removed: layers that are left out all along.
        progress: called with the tokens that each layer read.
        savings: the checkpoint that a killed pass resumes from.

    Raises:
        ValueError: influence of longer blocks was asked for: that needs all layers' hidden states
            at once.
    """
    if any(length > 1 for length in measures.influence):
        raise ValueError(
            "block influence of several layers together needs the model in memory: score.streaming=off"
        )
    with tempfile.TemporaryDirectory(dir=spill) as name:
        (Path(name) / "model").mkdir()
        loader = _OneLayer(checkpoint, device, Path(name) / "model")
        batches = [batch for _, batch in samples.batches(groups, device)]
        one = _Pass(
            loader, HiddenStateStore(budget, Path(name)), batches, measures, removed, progress
        )
        found = one.run(savings, check=samples.positions_NS is not None)
    fingerprints = samples.fingerprints()
    done = {index: fingerprints[index] for group in groups for index in group}
    return replace(found, depth={**found.depth, **one.losses.depth()}, samples=done)


class _Pass:
    """State of one pass over all layers."""

    def __init__(
        self,
        loader: _OneLayer,
        store: HiddenStateStore,
        batches: Sequence[Batch],
        measures: Measures,
        removed: frozenset[int],
        progress: Callable[[int], None],
    ) -> None:
        self.loader, self.store, self.batches, self.measures = loader, store, batches, measures
        self.progress = progress
        self.family = loader.checkpoint.family
        self.layers = loader.checkpoint.architecture.sizes["layers"]
        self.kept = [layer for layer in range(self.layers) if layer not in removed]
        self.losses = Losses(self.layers, measures.losses, removed)

    def run(self, savings: LayerwiseCheckpoint | None, check: bool) -> CalibrationSums:
        """Takes all batches through layer after layer."""
        start, found = savings.load(self.store) if savings is not None else (0, CalibrationSums())
        if start:
            print(f"scoring resumes at layer {self.kept[start]}", flush=True)
        self.progress(start * sum(batch.tokens_BS.numel() for batch in self.batches))
        with closing(self._weights(start)) as read:
            for position, weights in enumerate(read, start):
                layer = weights.layer
                found = self._layer(weights, found, check)
                if savings is not None and layer != self.kept[-1]:
                    savings.save(self.store, position + 1, found)
        return found

    def _weights(self, start: int) -> Generator[_Weights, None, None]:
        """The weights of the layers that are left; the next is read while one computes, if memory allows."""
        read = self.loader.reads(self.kept[start:])
        outside, layer = layer_bytes(self.loader.checkpoint)
        # beside the next layer, freed memory that the allocator keeps takes about as much again
        roomy = available_bytes(torch.device("cpu")) > 4 * (outside + layer)
        yield from ahead(read, 1) if roomy else read

    def _layer(self, weights: _Weights, found: CalibrationSums, check: bool) -> CalibrationSums:
        """Takes all batches through one layer, and frees it."""
        layer = weights.layer
        with self.loader.loaded(weights) as (model, detour, here):
            if check:
                check_isolation(model, self.family)
            recorder = Recorder(weights.architecture, self.measures, only=[here])
            with recorder.attached(model):
                for number, batch in enumerate(self.batches):
                    self._advance(
                        model, detour, here, recorder, batch.to(self.loader.device), number, layer
                    )
                    self.progress(batch.tokens_BS.numel())
            if layer == self.kept[-1]:
                self._finish(model, detour)
            return _joined(found, recorder.sums(), layer, here, self.layers)

    def _advance(
        self,
        model: Any,
        detour: LayerControl,
        here: int,
        recorder: Recorder,
        batch: Batch,
        number: int,
        layer: int,
    ) -> None:
        """Takes a batch through a layer: for the whole model, and for each model without a block."""
        decoder, store = decoder_of(model, self.family), self.store
        recorder.mask, recorder.text_B = batch.mask_BS, batch.text_B
        recorder.paused, detour.catch = False, True
        if layer != self.kept[0]:
            detour.inject = {here: self._stored(None, number)}
        decoder(**batch.inputs())
        recorder.keep()
        before, after = detour.inputs[here], detour.output
        assert before is not None and after is not None
        recorder.paused = True
        for block in self.losses.blocks:
            if block[0] == layer:  # the model without this block goes on from here behind it
                store.put((block, number), before)
            elif block[0] < layer and layer not in block:
                detour.inject = {here: self._stored(block, number)}
                decoder(**batch.inputs())
                assert detour.output is not None
                store.put((block, number), detour.output)
        store.put((None, number), after)
        detour.output, detour.inject, detour.inputs[here] = None, {}, None

    def _stored(self, block: Block | None, number: int) -> Tensor:
        """Hidden states that waited, on the device; a GPU is not waited for."""
        device = self.loader.device
        return self.store.get((block, number)).to(device, non_blocking=device.type == "cuda")

    def _finish(self, model: Any, detour: LayerControl) -> None:
        """Final norm, head and loss of all that has come through the last layer."""
        if not self.losses.blocks:
            return
        detour.skip = frozenset(range(self.layers))
        for number, batch in enumerate(self.batches):
            fed = batch.to(self.loader.device)
            for block in [None, *self.losses.blocks]:
                detour.inject = {0: self._stored(block, number)}
                hidden_BSH = hidden_states(model, self.family, **fed.arguments())
                self.losses.add(block, loss_sum(model, self.family, hidden_BSH, fed.labels_BS))
            self.losses.keep()


def _joined(
    found: CalibrationSums, one: CalibrationSums, layer: int, here: int, layers: int
) -> CalibrationSums:
    """Adds the sums of one layer to those of the layers before it."""
    sums: dict[tuple[str, str], Moments] = dict(found.sums)
    for key, value in one.sums.items():
        placed = place(Moments(value.samples, value.total[here : here + 1], value.squares[here : here + 1]),
                       layer, layers)  # fmt: skip
        known = sums.get(key)
        sums[key] = (
            placed if known is None else replace(merge(known, placed), samples=placed.samples)
        )
    routed = dict(found.routed)
    for axis, counts in one.routed.items():
        known_counts = (
            routed[axis]
            if axis in routed
            else torch.zeros(layers, counts.shape[1], dtype=counts.dtype)
        )
        known_counts[layer] = counts[here]
        routed[axis] = known_counts
    depth = dict(found.depth)
    for name, part in one.depth.items():
        total = depth[name].total if name in depth else torch.zeros(layers, dtype=torch.float64)
        total[layer] = part.total[here]
        depth[name] = replace(part, total=total)
    by_text = found.by_text
    if one.by_text is not None:
        texts, _, experts = one.by_text.shape
        by_text = (
            torch.zeros(texts, layers, experts, dtype=torch.int64) if by_text is None else by_text
        )
        by_text[:, layer] = one.by_text[:, here]
    return replace(found, sums=sums, routed=routed, depth=depth, by_text=by_text)
