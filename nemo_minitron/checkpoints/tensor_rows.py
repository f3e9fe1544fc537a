"""Rows of a checkpoint's tensors: the bytes of a file as they are, or numbers made of them.

What reads weights asks here, a whole tensor or some rows at a time, and need not know how they are
stored.
"""

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.checkpoints.dtypes import BYTES, QUANTISED, TORCH

Block = np.ndarray[Any, np.dtype[Any]]
_PIECE = 2**21
"""Numbers that are made at a time; beside their bytes they lie in memory as float32."""
_ALL = {**TORCH, **QUANTISED}


class Files:
    """The files of a folder, open for as long as they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, int] = {}

    def __enter__(self) -> "Files":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def fill(self, file: str, start: int, memory: Block) -> None:
        """Fills memory with a file's bytes from ``start`` on.

        Raises:
            OSError: the file ends early.
        """
        if file not in self._open:
            self._open[file] = os.open(self.folder / file, os.O_RDONLY)
        view, done = memoryview(memory.data), 0
        while done < len(view):  # a read takes 2 GiB at most at a time
            count = os.preadv(self._open[file], [view[done:]], start + done)
            if count == 0:
                early = f"{self.folder / file} ends {len(view) - done} bytes early"
                raise OSError(errno.EIO, early)
            done += count

    def numbers(self, entry: "Entry", first: int, count: int) -> Tensor:
        """``count`` of a plain tensor's numbers from number ``first`` on, flat."""
        memory = np.empty(count * entry.width, np.uint8)
        self.fill(entry.file, entry.start + first * entry.width, memory)
        return torch.from_numpy(memory).view(_ALL[entry.dtype])


class Decoder(Protocol):
    """Makes a tensor's numbers of what its files hold."""

    def fill(self, files: Files, first: int, memory: Block) -> None:
        """Fills memory with the bytes of as many rows (units of dimension 0) as fit, from ``first`` on."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        file: the file that holds it.
        dtype: safetensors' name of its numbers' dtype.
        shape: its shape.
        start: where its bytes start.
        decoder: makes its numbers of the files' bytes; None: they are the bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    decoder: Decoder | None = None

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return BYTES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.width * math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one unit of dimension 0."""
        return self.width * math.prod(self.shape[1:])


def fill_rows(files: Files, entry: Entry, first: int, memory: Block) -> None:
    """Fills memory with as many rows of a tensor as fit, from ``first`` on.

    Args:
        files: of the checkpoint's folder.
        entry: the tensor.
        first: the first row; of a tensor without dimensions 0.
        memory: uint8, a multiple of the tensor's ``row_bytes`` long.

    Raises:
        OSError: the file ends early.
    """
    if entry.decoder is None:
        files.fill(entry.file, entry.start + first * entry.row_bytes, memory)
    else:
        entry.decoder.fill(files, first, memory)


def spans(rows: int, row_numbers: int) -> Iterator[tuple[int, int]]:
    """Cuts rows into pieces of a bounded count of numbers: first row, and the row behind the last."""
    step = max(1, _PIECE // max(1, row_numbers))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)
