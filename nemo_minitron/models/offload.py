"""torch: a model whose layers lie in the machine's memory, and come to the device one by one and in time.

Embedding, norms and head lie on the device. While a layer computes, the matrices of the next one are
copied into the other one of two buffers, on a stream of their own.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.families import Family
from nemo_minitron.models.causal_lm import decoder_of, layers_of

_ALIGNED = 256  # bytes; what kernels like a matrix to begin at

Place = tuple[dict[str, Any], str]
"""Where a module keeps a parameter or buffer: its dictionary, and the name in it."""


class _Matrix:
    """A matrix of a layer.

    Attributes:
        kept: the matrix in the machine's memory.
        start, end: where it lies in a buffer, in bytes.
        places: all that the layer knows it by.
        arrived: the matrix as it lies in each of the buffers.
    """

    def __init__(self, kept: Tensor, start: int) -> None:
        self.kept, self.start, self.end = kept, start, start + kept.nbytes
        self.places: list[Place] = []
        self.arrived: list[Tensor] = []

    def put(self, tensor: Tensor | None) -> None:
        """Puts the matrix, one that arrived or nothing where the layer looks for it."""
        for store, name in self.places:
            store[name] = tensor

    def arrive_in(self, buffer: Tensor) -> None:
        """Lays the matrix out in a further buffer."""
        lying = buffer[self.start : self.end].view(self.kept.dtype).view(self.kept.shape)
        self.arrived.append(_as(self.kept, lying))


class Offloaded:
    """A causal LM that computes on a device, and keeps its layers' matrices in the machine's memory.

    Between two passes its parameters are those in memory, and may be changed in place after
    ``wait``. A pass copies each layer anew; at most two are on the device at a time. The results
    are those of the model on the device, to the bit. One pass runs at a time.

    Attributes:
        device: where it computes.
        buffers: two, of the bytes of the largest layer.
        held: the number of the layer that each buffer holds, or None.
    """

    def __init__(self, model: Any, family: Family, device: torch.device) -> None:
        """Moves all but the layers' matrices to the device; these are page-locked where it is a GPU.

        Page-locked memory comes in powers of two: a matrix may take up to twice its bytes.

        Args:
            model: a frozen causal LM, wherever it lies.
            family: its table.
            device: where it is to compute.
        """
        self.device, layers = device, layers_of(model, family)
        cuda = device.type == "cuda"
        self._matrices = [_matrices(layer, cuda) for layer in layers]
        every = [matrix for matrices in self._matrices for matrix in matrices]
        for matrix in every:
            matrix.put(None)
        model.to(device)
        size = max(matrix.end for matrix in every)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.held: list[int | None] = [None, None]
        for matrix in every:
            matrix.put(matrix.kept)
            for buffer in self.buffers:
                matrix.arrive_in(buffer)
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._events = [torch.cuda.Event() for _ in self.buffers] if cuda else []
        decoder_of(model, family).register_forward_pre_hook(self._begin)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, number))
            layer.register_forward_hook(partial(self._after, number), always_call=True)

    def wait(self) -> None:
        """Until nothing is copied any more: only then may what lies in memory be changed."""
        if self._stream is not None:
            self._stream.synchronize()

    @torch.compiler.disable
    def _begin(self, *_: Any) -> None:
        """A new pass: what the buffers hold is of an earlier one."""
        self.held = [None, None]
        self._copy(0, 0)

    @torch.compiler.disable
    def _before(self, number: int, *_: Any) -> None:
        """Gives a layer its matrices, and has the next one's copied while it computes."""
        if number not in self.held:  # layers that do not run in their order
            self._copy(number, 0)
        buffer = self.held.index(number)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._events[buffer])
        for matrix in self._matrices[number]:
            matrix.put(matrix.arrived[buffer])
        if number + 1 < len(self._matrices):
            self._copy(number + 1, 1 - buffer)

    @torch.compiler.disable
    def _after(self, number: int, *_: Any) -> None:
        for matrix in self._matrices[number]:
            matrix.put(matrix.kept)
        if number in self.held:
            self.held[self.held.index(number)] = None

    def _copy(self, number: int, buffer: int) -> None:
        """Copies a layer into a buffer, once all layers that were begun before are through."""
        self.held[buffer] = number
        if self._stream is None:
            for matrix in self._matrices[number]:
                matrix.arrived[buffer].copy_(matrix.kept)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for matrix in self._matrices[number]:
                matrix.arrived[buffer].copy_(matrix.kept, non_blocking=True)
            self._events[buffer].record()


def _matrices(layer: nn.Module, pinned: bool) -> list[_Matrix]:
    """A layer's parameters and buffers of two dimensions and more, each once, in the machine's memory.

    Those that are page-locked take the others' place at once, so that only one layer is there twice.
    """
    found: dict[int, _Matrix] = {}
    end = 0
    for store, name, tensor in _tensors(layer):
        if tensor.dim() < 2:  # small, and what a pass may change
            continue
        if id(tensor) not in found:
            data = tensor.detach().cpu().contiguous()
            kept = _as(tensor, data.pin_memory() if pinned else data)
            found[id(tensor)] = _Matrix(kept, -(-end // _ALIGNED) * _ALIGNED)
            end = found[id(tensor)].end
        found[id(tensor)].places.append((store, name))
    for matrix in found.values():
        matrix.put(matrix.kept)
    return list(found.values())


def _tensors(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in layer.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is not None:
                    yield store, name, tensor


def _as(like: Tensor, data: Tensor) -> Tensor:
    """The data as a parameter, where the other one is."""
    return nn.Parameter(data, requires_grad=False) if isinstance(like, nn.Parameter) else data
