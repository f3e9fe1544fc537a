"""torch hooks: hidden states and attention's projections of a model, kept for a loss on them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nemo_minitron.families import Architecture, Tap, TensorRow
from nemo_minitron.families.grammar import segments
from nemo_minitron.models.module_hooks import on_tap

Place = tuple[str, int, int]
"""Term, layer, and number of the projection where the term has several."""


class Captures:
    """What the last forward pass of a model left at some places, with its autograd graph.

    Hidden states are those behind a norm, as in [P1] section 3.2: a layer's output is what the next
    layer's first norm makes of it. The embedding's output is taken as it is.

    Attributes:
        states: what was captured: Tensor of shape [samples, positions, channels] per place.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        terms: Iterable[str],
        layers: Iterable[int],
    ) -> None:
        """Hooks the model permanently.

        Args:
            model: a Hugging Face causal LM.
            architecture: its table and its config.json.
            terms: some of ``losses.intermediate.TERMS``.
            layers: layers, 0-based; negative ones count from the end.

        Raises:
            ValueError: there is no such layer, or it has no attention.
        """
        self.states: dict[Place, Tensor] = {}
        self._armed = False
        family = self._family = architecture.family
        self._sizes = architecture.sizes
        self._architecture = architecture
        self._attention = architecture.present.get("heads", [])
        # activation checkpointing runs layers a second time, in the backward pass: not to be
        # captured
        model.get_submodule(family.modules["decoder"]).register_forward_pre_hook(self._arm)
        for term in terms:
            for layer in [0] if term == "embedding" else layers:
                self._hook(model, term, self.resolve(layer))

    def resolve(self, layer: int) -> int:
        """The 0-based number of a layer.

        Raises:
            ValueError: there is none.
        """
        count = self._sizes["layers"]
        if not -count <= layer < count:
            raise ValueError(f"layers: expected {-count} to {count - 1}, found {layer}")
        return layer % count

    def take(self) -> dict[Place, Tensor]:
        """Returns the captures of the last forward pass, and clears them."""
        taken, self.states, self._armed = self.states, {}, False
        return taken

    def _arm(self, *_: Any) -> None:
        self.states, self._armed = {}, True

    def _hook(self, model: nn.Module, term: str, layer: int) -> None:
        taps = self._family.taps
        if term == "attention":
            self._hook_attention(model, layer)
        elif (
            term == "hidden" and layer == self._sizes["layers"] - 1
        ):  # the final norm ends the decoder
            self._keep(model, Tap("output", self._family.modules["decoder"]), (term, layer, 0))
        else:
            first, last = taps["hidden"][0], taps["hidden"][-1]
            entry = next(tap for tap in taps["layers"] if tap.side == "input")
            tap, at = {
                "embedding": (entry, 0),
                "hidden": (first, layer + 1),
                "mlp_input": (last, layer),
            }[term]
            self._keep(model, tap.at(self._family.layer, at), (term, layer, 0))

    def _hook_attention(self, model: nn.Module, layer: int) -> None:
        """Outputs of the projections to queries, keys and values, in the table's order."""
        if layer not in self._attention:
            raise ValueError(
                f"layers: layer {layer} has no attention, whose relations could be compared"
            )
        index = self._family.layer
        entry = next(tap for tap in self._family.taps["layers"] if tap.side == "input")
        number = 0
        for row in self._family.rows:
            _, inside, name = row.pattern.partition(f".{{{index}}}.")
            products = row.dims[0] if len(row.dims) == 2 and row.dims[1] == (("hidden",),) else ()
            if (
                not inside
                or not products
                or not all({"heads", "kv_heads"} & set(p) for p in products)
                or not self._has(row, layer)
            ):
                continue
            # names in memory, which are other ones than on disk for some: the tap knows where a
            # layer lies
            module = f"{entry.at(index, layer).module}.{name.removesuffix('.weight')}"
            widths = [width for _, _, width in segments(products, self._sizes)]
            self._keep(model, Tap("output", module), ("attention", layer, number), widths)
            number += len(widths)
        if not number:
            raise ValueError(
                f"layers: {self._family.model_type} makes queries, keys and values from latents: there are "
                "no relations to compare"
            )

    def _has(self, row: TensorRow, layer: int) -> bool:
        """Whether a layer has a row's tensor."""
        names = self._architecture.names(row, self._architecture.one_of_each)
        return any(units[self._family.layer] == layer for _, units in names)

    def _keep(
        self, model: nn.Module, tap: Tap, place: Place, widths: list[int] | None = None
    ) -> None:
        term, layer, number = place

        def note(x_BSU: Tensor) -> None:
            if not self._armed:
                return
            for i, part_BSU in enumerate(x_BSU.split(widths, -1) if widths else [x_BSU]):
                self.states[term, layer, number + i] = part_BSU

        on_tap(model, tap, note)
