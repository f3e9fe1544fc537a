"""What a training needs in memory on each rank, from config.json and family tables alone."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from nemo_minitron.families import Architecture
from nemo_minitron.families.grammar import row_axes
from nemo_minitron.losses.fused_linear_loss import most_cuda_bytes

PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
"""Bytes of a stored weight (its gradient and both moments of Adam are as large), and of an activation."""
_SPLIT = {"heads", "kv_heads", "ffn", "shared_ffn"}


@dataclass(frozen=True)
class Launch:
    """How a training is laid out.

    Attributes:
        ranks: processes.
        shard: whether FSDP2 splits weights, gradients and optimiser state
            (``training.parallel=shard``).
        tensor_parallel: ranks that share the matrix products of each layer.
        precision: a key of ``PRECISIONS``.
        tokens: tokens of a micro-batch (``batch_size`` x ``sequence_length``).
        checkpointing: whether layers keep no activations.
        teacher_shard: whether the teacher's weights are split too.
        teacher_bytes: of a weight of the teacher; 0: it is not on this device.
    """

    ranks: int = 1
    shard: bool = False
    tensor_parallel: int = 1
    precision: str = "bf16-mixed"
    tokens: int = 4096
    checkpointing: bool = False
    teacher_shard: bool = False
    teacher_bytes: int = 2

    def __post_init__(self) -> None:
        """Checks the layout.

        Raises:
            ValueError: an unknown precision, or ranks that cannot be laid out so.
        """
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}, found {self.precision!r}"
            )
        if (
            min(self.ranks, self.tensor_parallel, self.tokens) < 1
            or self.ranks % self.tensor_parallel
        ):
            raise ValueError(
                f"ranks: {self.ranks} ranks cannot be laid out by {self.tensor_parallel}"
            )


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank.

    Attributes:
        weights, gradients, optimizer: of the model that is trained.
        gathered: weights that FSDP2 holds whole for the layer at hand and the next, embedding and
            head; and the copies in low precision that autocast makes of all of them and keeps until
            the loss is there.
        teacher: its weights, and its largest layer where they are split.
        activations: what the backward pass needs of a micro-batch.
        loss: gradients of hidden states and head, and the chunk of logits.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    teacher: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """Their sum; allocators and kernels come on top, some 10 %."""
        return sum(asdict(self).values())


def training_footprint(
    model: Architecture,
    launch: Launch,
    teacher: Architecture | None = None,
) -> Footprint:
    """Estimates a training with AdamW.

    Weights, gradients, optimiser state and loss follow from the sizes; activations are what layers
    of this kind keep under fused attention: twice the outputs of their projections and four hidden
    states, per token, which is within a third of what was measured. Attention that keeps its scores
    (eager) and the scans of Mamba layers come on top.

    Args:
        model: the model that is trained.
        launch: how.
        teacher: the teacher; None: there is none.
    """
    stored, active = PRECISIONS[launch.precision]
    layers, outside = _parameters(model, launch.tensor_parallel)
    data_ranks = launch.ranks // launch.tensor_parallel if launch.shard else 1
    held = math.ceil((sum(layers) + outside) / data_ranks) * stored
    gathered = (2 * max(layers) + outside) * stored if launch.shard and data_ranks > 1 else 0
    gathered += (sum(layers) + outside) * active if stored > active else 0
    sizes = model.sizes
    return Footprint(
        weights=held,
        gradients=held,
        optimizer=2 * held,
        gathered=gathered,
        teacher=0 if teacher is None else _teacher(teacher, launch),
        activations=_activations(model, launch) * active,
        loss=sizes["hidden"] * (launch.tokens * active + sizes["vocab"] * 4)
        + most_cuda_bytes(sizes["vocab"], sizes["hidden"]),
    )


def activations_per_token(model: Architecture, tensor_parallel: int = 1) -> list[int]:
    """Numbers that each layer keeps of a token for its backward pass."""
    sizes = model.sizes
    kept = [4 * sizes["hidden"]] * sizes["layers"]
    placeholder = model.family.layer
    for name, row, shape in model.tensors():
        match = row.regex.fullmatch(name)
        if len(shape) < 2 or match is None or placeholder not in row.placeholders:
            continue
        if len(shape) == 3:  # all experts in one tensor, outputs last
            kept[int(match[placeholder])] += 2 * shape[-1] * sizes.get("experts_per_token", 1)
            continue
        share = (
            sizes["experts_per_token"] / sizes["experts"]
            if "expert_ffn" in row_axes(row.dims)
            else 1
        )
        split = tensor_parallel if _axes(row.dims[0]) & _SPLIT else 1
        kept[int(match[placeholder])] += int(2 * shape[0] * share / split)
    return kept


def _activations(model: Architecture, launch: Launch) -> int:
    kept = activations_per_token(model, launch.tensor_parallel)
    hidden = model.sizes["hidden"]
    if launch.checkpointing:  # every layer's input, and the layer that is computed again
        return launch.tokens * (len(kept) * hidden + max(kept))
    return launch.tokens * sum(kept)


def _parameters(model: Architecture, tensor_parallel: int) -> tuple[list[int], int]:
    """Parameters of every layer, and of what lies outside of them, on one of the tensor-parallel ranks."""
    layers, outside = [0] * model.sizes["layers"], 0
    placeholder = model.family.layer
    for name, row, shape in model.tensors():
        match = row.regex.fullmatch(name)
        if match is None or placeholder not in row.placeholders:
            outside += math.prod(shape)
            continue
        split = tensor_parallel if row_axes(row.dims) & _SPLIT else 1
        layers[int(match[placeholder])] += math.prod(shape) // split
    return layers, outside


def _teacher(model: Architecture, launch: Launch) -> int:
    layers, outside = _parameters(model, 1)
    if not launch.teacher_shard:
        return (sum(layers) + outside) * launch.teacher_bytes
    held = math.ceil((sum(layers) + outside) / launch.ranks)
    return (held + 2 * max(layers) + outside) * launch.teacher_bytes


def _axes(dim: Any) -> set[str]:
    return {axis for product in dim for axis in product}
