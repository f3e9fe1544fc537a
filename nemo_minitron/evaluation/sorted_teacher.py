"""A teacher whose units stand in the order of their importance, and smaller models as views of its weights.

The teacher is sorted once. A candidate is then a number of units of each axis and some layers: modules of
the smaller shape over the beginnings of the sorted tensors. Nothing is written, and nothing copied but
tensors whose surviving rows do not lie together (query heads that shrink inside their groups, projections
that are fused in memory), and those in which heads are merged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint, load_tensor
from nemo_minitron.families import CHOSEN_EXPERTS, Architecture, check_sizes, find_row
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.skeleton import Layout, fill, layouts, skeleton, source_name
from nemo_minitron.pruning.head_merge import (
    HEADS,
    HeadMerge,
    Mix,
    merged_into,
    merges,
    mix_of,
    mixed,
)
from nemo_minitron.pruning.positions import dim_index
from nemo_minitron.pruning.select import Keep, complete_targets
from nemo_minitron.pruning.slice import Cut, cut_tensor, fold_of, pieces
from nemo_minitron.pruning.sorted_units import beginnings, importance_order


class SortedTeacher:
    """A model in memory, sorted by importance, of which smaller ones are made.

    Attributes:
        architecture: the model's.
        model: the sorted model itself, which computes what the stored one does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ranking: Mapping[str, Tensor],
        dtype: torch.dtype | str = "auto",
        device: torch.device | None = None,
        head_merge: str = "none",
    ) -> None:
        """Loads and sorts a model.

        Args:
            checkpoint: the model.
            ranking: axis name to importance scores.
            dtype: of the weights in memory; ``auto`` is that of config.json.
            device: where they go.
            head_merge: as ``plan.head_merge``; what candidates do with the query heads that they lose.

        Raises:
            ValueError: scores that are not finite; the model does not load strictly.
        """
        self._head_merge = head_merge
        self.architecture = checkpoint.architecture
        family, sizes = checkpoint.family, checkpoint.architecture.sizes
        self._order = importance_order(family, ranking, sizes)
        cut = Cut(checkpoint.architecture, self._order, tuple(range(sizes["layers"])))
        names = [name for name in checkpoint.entries if find_row(family, name) is not None]
        tensors = {
            piece.name: cut_tensor(load_tensor(checkpoint, piece.source), piece, sizes)
            for piece in pieces(cut, names)
        }
        self.model = load_model(checkpoint.folder, dtype, device, tensors)
        self._layouts = layouts(self.model, family)
        self._state = dict(self.model.state_dict())

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(iter(self._state.values())).device

    def candidate(self, sizes: Mapping[str, int], layers: Sequence[int]) -> Any:
        """A smaller model over the teacher's weights, for reading.

        Args:
            sizes: axis name to size, for the axes that shrink.
            layers: 0-based layers that stay, ascending.

        Returns:
            A Hugging Face causal LM in evaluation mode; it computes what the pruned checkpoint does.

        Raises:
            ValueError: sizes that the family does not allow, or that the scores do not rank.
        """
        source = self.architecture
        widths = {axis: size for axis, size in sizes.items() if axis != "layers"}
        targets = complete_targets(source.family, source.sizes, widths, "candidate")
        targets["layers"] = len(layers)
        check_sizes(source.family, targets, "candidate")
        keep = beginnings(source.family, self._order, source.sizes, targets)
        chosen, merge = sizes.get(CHOSEN_EXPERTS), self._merge(keep, targets)
        cut = Cut(source, keep, tuple(layers), chosen, merge)
        model = skeleton(cut.result.config, self.model.dtype)
        views = _Views(cut)
        tensors = {}
        for name, empty in model.state_dict().items():
            origin = source_name(self.model, source.family, name, cut.layers)
            tensor = views.of(self._state[origin], self._layouts[origin])
            assert tensor.shape == empty.shape, (name, tensor.shape, empty.shape)
            tensors[name] = tensor
        return fill(model, tensors, self.device)

    def _merge(self, keep: Keep, targets: Mapping[str, int]) -> HeadMerge | None:
        """What the heads that go leave in the others: in every layer alike, for all are sorted."""
        source = self.architecture
        if self._head_merge == "none" or not merges(source, targets):
            return None
        group = source.family.axes[HEADS].within
        assert group is not None, "heads that are merged lie in groups"
        falling_LU = -torch.arange(source.sizes[HEADS])[None]
        kept = {axis: keep[axis][None] for axis in (HEADS, group) if axis in keep}
        into_LU = merged_into(falling_LU, kept, group, source.sizes[group])
        return HeadMerge(self._head_merge, into_LU)


class _Views:
    """What stays of the sorted tensors in one cut; positions along equal dimensions are found once."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._known: dict[int, Tensor | None] = {}

    def of(self, tensor: Tensor, layout: Layout) -> Tensor:
        mix = self._mix(layout)
        for position, parts in enumerate(layout.dims):
            if mix is not None and mix.dim == position:
                assert len(parts) == 1, f"{layout.name}: transformers fuses what holds query heads"
                places = parts[0][1][mix.indices_MP]
                tensor = mixed(tensor, replace(mix, indices_MP=places))
                continue
            if id(parts) not in self._known:
                self._known[id(parts)] = self._positions(parts)
            stay = self._known[id(parts)]
            if stay is not None:
                tensor = _taken(tensor, position, stay)
        scale, offset = fold_of(self._cut, layout.name)
        if scale == 1.0:
            return tensor
        return ((tensor.float() + offset) * scale - offset).to(tensor.dtype)

    def _mix(self, layout: Layout) -> Mix | None:
        """How a tensor that holds heads is summed; None: it is not."""
        found, merge = find_row(self._cut.family, layout.name), self._cut.merge
        if merge is None or found is None or found[0].pattern not in self._cut.attention:
            return None
        role = self._cut.attention[found[0].pattern]
        into_U = merge.into_LU[0]
        return mix_of(found[0], role, merge.how, into_U, self._cut.keep, self._cut.before)

    def _positions(self, parts: Sequence[Any]) -> Tensor | None:
        """The positions in memory that stay, ascending; None where all do."""
        kept, whole = [], True
        for dim, places in parts:
            index = dim_index(dim, self._cut.before, self._cut.keep)
            whole = whole and index is None
            kept.append(places if index is None else places[index])
        return None if whole else torch.cat(kept).sort().values


def _taken(tensor: Tensor, position: int, stay: Tensor) -> Tensor:
    """A view of the positions that stay where they lie together, else a copy of them."""
    first, last = int(stay[0]), int(stay[-1])
    if last - first + 1 == len(stay):
        return tensor.narrow(position, first, len(stay))
    return tensor.index_select(position, stay.to(tensor.device))


def whole(architecture: Architecture) -> tuple[int, ...]:
    """All layers of a model."""
    return tuple(range(architecture.sizes["layers"]))
