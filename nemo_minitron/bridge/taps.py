"""torch hooks: the activations that a family's taps name, gathered while a model runs forward.

Shape suffixes: B samples, S positions, U units, H hidden channels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.core.importance import Moments, cosine_sums, merge, moments, over_sequence
from nemo_minitron.families import Family, Tap, axis_sizes, find_row
from nemo_minitron.families.family import expand
from nemo_minitron.families.grammar import Product


class Recorder:
    """Sums of a forward pass over calibration samples, for every tapped axis.

    Attributes:
        sums: axis name to one ``Moments`` per tap position, in layer order.
        cosines: per layer, sum of cosines between its input and output, and the number of tokens.
        mask: positions that count in the coming forward pass, Tensor of shape [samples, positions], or None
            for all.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], sequence: str, depth: bool) -> None:
        self.family = family
        self.sizes = axis_sizes(family, config)
        self.sequence = sequence
        self.depth = depth
        self.sums: dict[str, list[Moments | None]] = {}
        self.cosines = [(0.0, 0)] * self.sizes["layers"]
        self.mask: Tensor | None = None
        self._layer_input: list[Tensor | None] = [None] * self.sizes["layers"]

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Hooks the model for the length of the block."""
        handles = []
        for axis, taps in self.family.taps.items():
            if axis == "layers":
                continue
            places = [(tap, path) for tap in taps for path in expand(self.family, tap.module, self.sizes)]
            self.sums.setdefault(axis, [None] * len(places))
            for place, (tap, path) in enumerate(places):
                record = partial(self._record, axis, place, self._product(path, tap, axis))
                handles.append(_hook(model.get_submodule(path), tap, record))
        for tap in self.family.taps["layers"] if self.depth else ():
            record_side = self._enter if tap.side == "input" else self._leave
            for layer, path in enumerate(expand(self.family, tap.module, self.sizes)):
                handles.append(_hook(model.get_submodule(path), tap, partial(record_side, layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _product(self, path: str, tap: Tap, axis: str) -> Product:
        """The axes along the tapped activation's last dimension, from the row of the module's weight."""
        found = find_row(self.family, f"{path}.weight")
        assert found is not None, path
        dim = found[0].dims[-1 if tap.side == "input" else 0]
        assert len(dim) == 1 and axis in dim[0], (path, axis, dim)
        return dim[0]

    def _record(self, axis: str, place: int, product: Product, x_BSU: Tensor) -> None:
        if len(product) > 1:  # a unit is a vector (a head): its L2 norm stands for it ([P1] section 2.2)
            x_BSU = x_BSU.unflatten(-1, [self.sizes[name] for name in product])
            others = [2 + i for i, name in enumerate(product) if name != axis]
            x_BSU = torch.linalg.vector_norm(x_BSU, dim=others, dtype=torch.float32)
        batch = moments(over_sequence(x_BSU, self.mask, self.sequence))
        known = self.sums[axis][place]
        self.sums[axis][place] = batch if known is None else merge(known, batch)

    def _enter(self, layer: int, x_BSH: Tensor) -> None:
        self._layer_input[layer] = x_BSH

    def _leave(self, layer: int, x_BSH: Tensor) -> None:
        before_BSH = self._layer_input[layer]
        assert before_BSH is not None
        total, tokens = cosine_sums(before_BSH, x_BSH, self.mask)
        self._layer_input[layer] = None
        self.cosines[layer] = (self.cosines[layer][0] + total, self.cosines[layer][1] + tokens)

    def stacked(self) -> dict[str, Moments]:
        """Sums of all tap positions together.

        Axis name to ``Moments`` of shape [tap positions, units], on the CPU.
        """
        result = {}
        for axis, places in self.sums.items():
            full = [item for item in places if item is not None]
            assert len(full) == len(places), f"no activation reached the taps of {axis}"
            total = torch.stack([item.total for item in full]).cpu()
            squares = torch.stack([item.squares for item in full]).cpu()
            result[axis] = Moments(full[0].samples, total, squares)
        return result


def _hook(module: nn.Module, tap: Tap, record: Callable[[Tensor], None]) -> Any:
    if tap.side == "input":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(after)
