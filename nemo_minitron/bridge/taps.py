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
from nemo_minitron.families import Family, Tap, axis_sizes, fill, find_row, present_axes
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
        self.present = present_axes(family, config)
        self.placeholder = family.axes["layers"].index or ""
        self.sequence = sequence
        self.depth = depth
        self.sums: dict[str, list[Moments | None]] = {}
        self.cosines = [(0.0, 0)] * self.sizes["layers"]
        self.mask: Tensor | None = None
        self._samples_positions = torch.Size()
        self._layer_input: list[Tensor | None] = [None] * self.sizes["layers"]

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Hooks the model for the length of the block."""
        handles = []
        for axis, taps in self.family.taps.items():
            if axis == "layers" or axis not in self.present:
                continue
            per_layer = self.family.axes[axis].scope != "model"
            layers = self.present[axis] if per_layer else range(self.sizes["layers"])
            places = [(layer, tap) for tap in taps for layer in layers]
            self.sums.setdefault(axis, [None] * len(places))
            for place, (layer, tap) in enumerate(places):
                path = fill(tap.module, {self.placeholder: layer})
                record = partial(self._record, axis, place, self._product(path, tap, axis))
                handles.append(_hook(model.get_submodule(path), tap, record))
        for tap in self.family.taps["layers"] if self.depth else ():
            record_side = self._enter if tap.side == "input" else self._leave
            for layer in range(self.sizes["layers"]):
                path = fill(tap.module, {self.placeholder: layer})
                handles.append(_hook(model.get_submodule(path), tap, partial(record_side, layer)))
        first = self.family.taps["layers"][0].module
        module = model.get_submodule(fill(first, {self.placeholder: 0}))
        handles.append(_hook(module, Tap("input", first), self._see_shape))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _product(self, path: str, tap: Tap, axis: str) -> Product:
        """The axes along the tapped activation's last dimension: the tap's, or the module's weight's."""
        if tap.product is not None:
            return tap.product
        found = find_row(self.family, f"{path}.weight")
        assert found is not None, path
        dim = found[0].dims[-1 if tap.side == "input" else 0]
        assert len(dim) == 1 and axis in dim[0], (path, axis, dim)
        return dim[0]

    def _see_shape(self, x_BSH: Tensor) -> None:
        self._samples_positions = x_BSH.shape[:2]

    def _record(self, axis: str, place: int, product: Product, x_BSU: Tensor) -> None:
        if x_BSU.dim() == 2:  # experts get their tokens as one list
            x_BSU = x_BSU.unflatten(0, self._samples_positions)
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
        """Sums of all tap positions together, on the CPU.

        Axis name to ``Moments`` of shape [tap positions, units] for the axes ranked once for the model, and
        of shape [layers, units] for the others, zero in layers that do not have the axis.
        """
        result = {}
        for axis, places in self.sums.items():
            full = [item for item in places if item is not None]
            assert len(full) == len(places), f"no activation reached the taps of {axis}"
            total = torch.stack([item.total for item in full]).cpu()
            squares = torch.stack([item.squares for item in full]).cpu()
            if self.family.axes[axis].scope != "model":
                total, squares = (self._by_layer(axis, sums) for sums in (total, squares))
            result[axis] = Moments(full[0].samples, total, squares)
        return result

    def _by_layer(self, axis: str, sums: Tensor) -> Tensor:
        spread = torch.zeros(self.sizes["layers"], sums.shape[1], dtype=sums.dtype)
        return spread.index_add(0, torch.tensor(self.present[axis]), sums)


def _hook(module: nn.Module, tap: Tap, record: Callable[[Tensor], None]) -> Any:
    if tap.side == "input":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(after)
