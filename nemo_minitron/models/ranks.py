"""torch.distributed: the processes that torchrun starts, as far as scoring needs them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=30)
"""How long ranks wait for each other. One may measure for hours what others have done; a rank that has died
is noticed by torchrun, not by this."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of one run."""

    rank: int = 0
    size: int = 1
    local: int = 0
    neighbours: int = 1
    """How many of the processes run on this machine."""

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, act: Callable[[], Any]) -> None:
        """Does something on rank 0; the others wait until it is done."""
        if self.rank == 0:
            act()
        self.broadcast(None)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on every rank."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def join(device: str) -> Ranks:
    """Joins the process group that torchrun's environment describes; alone where there is none.

    Args:
        device: what the stage computes on, as ``score.device``; on GPUs every rank takes its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    cuda = torch.cuda.is_available() and device != "cpu"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    return Ranks(dist.get_rank(), size, local, neighbours)


def leave() -> None:
    """Waits for all processes, and leaves their group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
