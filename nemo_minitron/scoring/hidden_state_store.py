"""Hidden states that wait between two layers, in memory and, beyond a budget, on disk."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.scoring.pass_in_memory import Block

Stream = tuple[Block | None, int]
"""Hidden states that wait for the next layer: of the model without a block (None: whole), for a batch."""


class HiddenStateStore:
    """Tensors kept in memory up to a budget, and beyond it on disk."""

    def __init__(self, budget: int, folder: Path) -> None:
        """An empty store.

        Args:
            budget: bytes to keep in memory.
            folder: an existing folder for the rest.
        """
        self._left, self._folder = budget, folder
        self._memory: dict[Stream, Tensor] = {}
        self._disk: dict[Stream, Path] = {}
        self._copying: torch.device | None = None

    def put(self, key: Stream, tensor: Tensor) -> None:
        """Stores a tensor; it replaces one with the same key."""
        self.drop(key)
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._memory[key] = self._beside(tensor)
            return
        path = self._folder / f"{file_name(key)}.safetensors"
        save_file({"hidden": tensor.cpu().contiguous()}, path)
        self._disk[key] = path

    def _beside(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU; a GPU is not waited for, and copies it when it comes to that."""
        if tensor.device.type != "cuda":
            return tensor.cpu()
        self._copying = tensor.device
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return here.copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Waits until a GPU has copied what is stored: before the CPU reads it."""
        if self._copying is not None:
            torch.cuda.synchronize(self._copying)

    def get(self, key: Stream) -> Tensor:
        """A tensor, by key; the GPU that stored it may take it at once, the CPU behind ``wait``."""
        return self._memory[key] if key in self._memory else load_file(self._disk[key])["hidden"]

    def drop(self, key: Stream) -> None:
        """Removes a tensor, if there is one."""
        if key in self._memory:
            self._left += self._memory.pop(key).nbytes
        elif key in self._disk:
            self._disk.pop(key).unlink()

    def keys(self) -> list[Stream]:
        """Keys of the stored tensors."""
        return [*self._memory, *self._disk]


def file_name(key: Stream) -> str:
    """Name of the file of a key, without its suffix."""
    block, batch = key
    return f"{batch}-{'-'.join(map(str, block or ()))}"
