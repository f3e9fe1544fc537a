"""safetensors shards written as a stream: one tensor in memory at a time, hashed on the way."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.artifacts.checkpoint import INDEX, SINGLE
from nemo_minitron.artifacts.manifest import write_json

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, dtype and shape are known before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_weights(
    folder: Path,
    tensors: Sequence[Planned],
    read: Callable[[str], Tensor],
    shard_bytes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Writes safetensors shards and, where there are several, their index, one tensor in memory at a time.

    Args:
        folder: an existing folder.
        tensors: what to write, in the order of the file.
        read: gives the values of one tensor by name.
        shard_bytes: largest shard, in bytes of tensors; a larger tensor gets a shard of its own.
        progress: called with the bytes of each tensor written.

    Returns:
        File name to SHA-256, computed while writing.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    hashes = {}
    for file, shard in zip(names, shards, strict=True):
        hashes[file] = _write_shard(folder / file, shard, read, progress)
    if len(shards) > 1:
        weight_map = {
            tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.size for tensor in tensors)
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    return hashes


def _write_shard(
    path: Path, tensors: Iterable[Planned], read: Callable[[str], Tensor], progress: Callable[[int], None]
) -> str:
    # widest numbers first keeps every tensor aligned to its own width, as the safetensors library does
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        span = [offset, offset + tensor.size]
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digester = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        for block in (struct.pack("<Q", len(encoded)), encoded):
            file.write(block)
            digester.update(block)
        for tensor in ordered:
            values = read(tensor.name)
            assert tuple(values.shape) == tensor.shape and values.dtype == tensor.dtype, tensor
            data = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
            hashed = hasher.submit(digester.update, data)  # both let go of the interpreter's lock
            file.write(data)
            hashed.result()
            progress(tensor.size)
    return digester.hexdigest()
