"""Writes safetensors shards as a stream of blocks, and hashes them; only the current block is in memory."""

import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import INDEX, SINGLE
from nemo_minitron.checkpoints.dtypes import DTYPES
from nemo_minitron.workspace.manifest import write_json

_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
Block = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, safetensors dtype and shape are known before its values are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return _WIDTH[self.dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.width * int(np.prod(self.shape, dtype=np.int64))


def stored_order(tensors: Sequence[Planned]) -> list[Planned]:
    """Widest numbers first.

    So every tensor lies aligned to its own width in its file, as the safetensors library has it.
    """
    return sorted(tensors, key=lambda tensor: -tensor.width)


class ShardWriter:
    """Writes tensors, block by block, into shards and, where there are several, their index.

    Blocks are written and hashed, each in a thread of its own, while the caller makes the next. A
    block must not be changed before ``wait`` has returned for its ticket.
    """

    MOST = 4
    """Blocks that may be on their way to the disk."""

    def __init__(self, folder: Path, tensors: Sequence[Planned], shard_bytes: int) -> None:
        """Plans the shards.

        Args:
            folder: an existing folder.
            tensors: what will be written, in ``stored_order``.
            shard_bytes: largest shard, in bytes of tensors; a larger tensor gets a shard of its
                own.

        Raises:
            OSError: the disk has no room for them.
        """
        total = sum(tensor.size for tensor in tensors)
        free = shutil.disk_usage(folder).free
        if total > free:
            text = f"no space left: {folder} needs {total:,} bytes, {free:,} are free"
            raise OSError(errno.ENOSPC, text)
        self.hashes: dict[str, str] = {}
        self._folder, self._total = folder, total
        self._shards = _shards(tensors, shard_bytes)
        self._files = _file_names(len(self._shards))
        self._position, self._left = -1, 0
        self._file: FileIO | None = None
        self._digester = hashlib.sha256()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: list[tuple[Future[Any], Future[Any]]] = []
        self._ticket = 0

    def __enter__(self) -> "ShardWriter":
        """Opens the first shard."""
        self._next_shard()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finishes the last shard and the index; after an error only closes the file and ends the threads."""
        try:
            if kind is None:
                self._finish_shard()
                assert self._position == len(self._shards) - 1, "fewer bytes than planned"
                self._write_index()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._hasher.shutdown(cancel_futures=True)
            if self._file is not None:
                self._file.close()

    def write(self, block: Block) -> int:
        """Appends a contiguous block, which may end a tensor but not reach into the next shard.

        Returns:
            The block's ticket.
        """
        data = memoryview(block.reshape(-1).view(np.uint8).data)
        if self._left == 0:
            self._finish_shard()
            self._next_shard()
        assert len(data) <= self._left and self._file is not None, "more bytes than planned"
        self._left -= len(data)
        self._pending.append(
            (
                self._writer.submit(_put, self._file, data),
                self._hasher.submit(self._digester.update, data),
            )
        )
        self._ticket += 1
        self.wait(self._ticket - self.MOST)
        return self._ticket

    def wait(self, ticket: int) -> None:
        """Returns when the block with this ticket is written and hashed."""
        while self._pending and self._ticket - len(self._pending) < ticket:
            for future in self._pending.pop(0):
                future.result()

    def _next_shard(self) -> None:
        self._position += 1
        shard = self._shards[self._position]
        header = _header(shard)
        self._file = (self._folder / self._files[self._position]).open("wb", buffering=0)
        self._digester = hashlib.sha256(header)
        self._file.write(header)
        self._left = sum(tensor.size for tensor in shard)

    def _finish_shard(self) -> None:
        self.wait(self._ticket)
        assert self._left == 0 and self._file is not None, "fewer bytes than planned"
        self._file.close()
        self.hashes[self._files[self._position]] = self._digester.hexdigest()

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        weight_map = {
            tensor.name: file
            for file, shard in zip(self._files, self._shards, strict=True)
            for tensor in shard
        }
        meta = {"total_size": self._total}
        write_json(
            self._folder / INDEX, {"metadata": meta, "weight_map": dict(sorted(weight_map.items()))}
        )


def _put(file: FileIO, data: memoryview) -> None:
    """Writes all bytes. One system call writes at most 2 GiB, and less when the disk is nearly full."""
    done = 0
    try:
        while done < len(data):
            done += file.write(data[done:])
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _shards(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _header(tensors: Sequence[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        span = [start, start + tensor.size]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        start = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def write_weights(
    folder: Path, tensors: Sequence[Planned], read: Callable[[str], Tensor], shard_bytes: int
) -> dict[str, str]:
    """Writes safetensors shards, one tensor in memory at a time.

    Args:
        folder: an existing folder.
        tensors: what to write.
        read: gives the values of one tensor by name.
        shard_bytes: largest shard, in bytes of tensors.

    Returns:
        File name to SHA-256, computed while writing.
    """
    ordered = stored_order(tensors)
    with ShardWriter(folder, ordered, shard_bytes) as writer:
        for tensor in ordered:
            values = read(tensor.name).detach().contiguous()
            assert tuple(values.shape) == tensor.shape and DTYPES[values.dtype] == tensor.dtype, (
                tensor
            )
            if tensor.size:
                writer.write(values.reshape(-1).view(torch.uint8).numpy())
    return writer.hashes
