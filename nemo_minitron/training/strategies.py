"""FSDP2, with tensor parallelism where asked for, through Lightning's ModelParallelStrategy.

Every layer's weights, gradients and optimiser state are split over the data-parallel ranks, and
gathered for the layer's own forward and backward pass only. Checkpoints are written in parts
(torch.distributed.checkpoint), which any number of ranks reads.
"""

import os
import types
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nemo_minitron.families import Architecture, Family
from nemo_minitron.models.causal_lm import ENTRY, decoder_of, layers_of
from nemo_minitron.training.checkpoint_safety import DataReader

_METADATA = "meta.pt"  # Lightning's name for what is neither weights nor optimiser
_PORT, _RUN = "MASTER_PORT", "TORCHELASTIC_RUN_ID"
_SPLIT = {"heads", "kv_heads", "ffn", "shared_ffn"}


class Sharded(ModelParallelStrategy):
    """FSDP2 x TP whose checkpoints can be read again.

    Lightning 2.4 reads its own metadata file, which holds NeMo's configuration, in a mode in which
    torch >= 2.6 takes tensors only; and torch's, a pickle, in one in which it runs code.
    """

    def setup_environment(self) -> None:
        """Meets the other ranks; a rank alone listens on a port that the system chooses while it listens.

        Lightning takes the port of an earlier training of this process, which may still be listening, or
        asks for a free one first and listens later, when another process may have taken it.
        """
        alone = self.num_nodes * self.num_processes == 1 and _RUN not in os.environ
        before = os.environ.get(_PORT)
        if alone:
            os.environ[_PORT] = "0"
        try:
            super().setup_environment()
        finally:
            if alone and before is None:
                os.environ.pop(_PORT, None)
            elif alone:
                os.environ[_PORT] = str(before)

    def load_checkpoint(self, checkpoint_path: Any) -> dict[str, Any]:
        """Reads weights and optimiser state into the parts that this rank holds, and returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        weights = {"state_dict": get_model_state_dict(self.model)}
        dcp.load(weights, storage_reader=DataReader(path))
        self.model.load_state_dict(weights["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            state = {key: get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, storage_reader=DataReader(path))
            set_optimizer_state_dict(self.model, optimizer, state[key])
        found: dict[str, Any] = self.checkpoint_io.load_checkpoint(path / _METADATA)
        return found


def shard(model: Any, family: Family, mesh: DeviceMesh) -> None:
    """Splits a causal LM over the ranks of a mesh with the dimensions data_parallel and tensor_parallel.

    Raises:
        ValueError: the family cannot be split by tensor parallelism, or not into as many parts.
    """
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if tensor.size() > 1:
        plan = tensor_plan(Architecture(family, model.config.to_dict()), tensor.size())
        for layer in layers_of(model, family):
            parallelize_module(layer, tensor, plan)
    for layer in layers_of(model, family):
        fully_shard(layer, mesh=data)
    decoder = decoder_of(model, family)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return decoder(*args, **kwargs)

    # embedding, final norm and head stay gathered from the decoder's pass until the loss has used
    # the head
    fully_shard(model, mesh=data, reshard_after_forward=False)
    setattr(model, ENTRY, types.MethodType(run, model))
    register_fsdp_forward_method(model, ENTRY)


def tensor_plan(architecture: Architecture, parts: int) -> dict[str, Any]:
    """How the projections of a layer are split: by output channels, and those behind them by input channels.

    The rows of the family's table say which: ``(heads head_dim) hidden`` is split by its output,
    ``hidden (heads head_dim)`` by its input.

    Raises:
        ValueError: a row that cannot be split so, or sizes that ``parts`` does not divide.
    """
    where, sizes = f"training.tensor_parallel={parts}", architecture.sizes
    family, index = architecture.family, architecture.family.layer
    plan: dict[str, Any] = {}
    for row in family.rows:
        _, inside, name = row.pattern.partition(f".{{{index}}}.")
        axes = [set(axis for product in dim for axis in product) for dim in row.dims]
        split = [bool(found & _SPLIT) for found in axes]
        if not inside or not (any(split) or any("head_dim" in found for found in axes)):
            if inside and any("experts" in found or "expert_ffn" in found for found in axes):
                raise ValueError(
                    f"{where}: {row.pattern} of {family.model_type}: experts are not split; use 1"
                )
            continue
        module, _, kind = name.rpartition(".")
        if (
            not any(split)
            or any(len(dim) > 1 for dim in row.dims)
            or (len(row.dims) == 1 and kind != "bias")
        ):
            raise ValueError(
                f"{where}: {row.pattern} of {family.model_type} cannot be split; use 1"
            )
        for axis in sorted(set().union(*axes) & _SPLIT):
            if sizes[axis] % parts:
                raise ValueError(f"{where}: does not divide {axis}={sizes[axis]}")
        if len(row.dims) == 2:
            plan[module] = ColwiseParallel() if split[0] else RowwiseParallel()
    return plan


def gathered(module: nn.Module) -> dict[str, Any]:
    """The whole weights on the CPU of rank 0, tensor by tensor; nothing on the others. All ranks call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def sharding_strategy(tensor_parallel: int) -> Sharded:
    """The strategy that splits the model.

    Raises:
        ValueError: the ranks cannot be laid out so.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % tensor_parallel:
        raise ValueError(
            f"training.tensor_parallel: {tensor_parallel} does not divide the {ranks} ranks"
        )
    return Sharded(
        data_parallel_size=ranks // tensor_parallel, tensor_parallel_size=tensor_parallel
    )
