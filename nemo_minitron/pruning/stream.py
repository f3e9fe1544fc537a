"""Prunes as a stream: blocks of rows go from the source's shards into the results' shards.

One pass over the source serves any number of cuts. Memory holds a few blocks of about eight
megabytes (of one unit of dimension 0 where that is longer), whatever the size of model and tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.dtypes import TORCH
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.shard_writer import Block, Planned, ShardWriter, stored_order
from nemo_minitron.checkpoints.side_files import copy_side_files
from nemo_minitron.checkpoints.tensor_rows import Entry, Files, fill_rows
from nemo_minitron.families import VOCAB
from nemo_minitron.pruning.head_merge import Mix, mixed
from nemo_minitron.pruning.slice import Cut, Piece, cut_config, pieces, rescaled
from nemo_minitron.pruning.tokenizer_cut import cut_tokenizer
from nemo_minitron.workspace.manifest import write_json

BLOCK_BYTES = 8 * 2**20
GAP_BYTES = 32 * 1024
"""Bytes that cost less to read along than a call of their own."""
_INTEGER = {2: np.int16, 4: np.int32, 8: np.int64}
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class _Target:
    """One result in the making: its pieces by source tensor, and its writer."""

    pieces: dict[str, Piece]
    writer: ShardWriter


class _Buffers:
    """Buffers used in turn; a buffer is reused once all its readers are done."""

    def __init__(self, count: int) -> None:
        self._memory = [np.empty(0, np.uint8) for _ in range(count)]
        self._lent: list[list[tuple[ShardWriter, int]]] = [[] for _ in range(count)]
        self._turn = 0

    def next(self, size: int) -> Block:
        """Memory of ``size`` bytes."""
        self._turn = (self._turn + 1) % len(self._memory)
        for writer, ticket in self._lent[self._turn]:
            writer.wait(ticket)
        self._lent[self._turn] = []
        if self._memory[self._turn].size < size:
            self._memory[self._turn] = np.empty(size, np.uint8)
        return self._memory[self._turn][:size]

    def lend(self, writer: ShardWriter, ticket: int) -> None:
        """Notes that a writer still reads what ``next`` gave last."""
        self._lent[self._turn].append((writer, ticket))


def write_pruned(
    checkpoint: Checkpoint,
    cuts: Sequence[tuple[Path, Cut]],
    shard_bytes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, str]]:
    """Streams a checkpoint through one or several cuts, reading it once.

    Args:
        checkpoint: the source.
        cuts: an existing, empty folder and a cut of this checkpoint, for every result.
        shard_bytes: largest shard.
        progress: called with the bytes written, block by block.

    Returns:
        For every result, file name to SHA-256 of its weight files.

    Raises:
        ValueError: a result would not be what its config.json says.
        OSError: the disk is full, or a source file ends early.
    """
    stored = stored_order(
        [Planned(name, e.dtype, e.shape) for name, e in checkpoint.entries.items()]
    )
    order = [item.name for item in stored]
    with ExitStack() as stack:
        targets = []
        for folder, cut in cuts:
            survivors = {piece.source: piece for piece in pieces(cut, order)}
            planned = _planned(checkpoint, survivors.values())
            writer = stack.enter_context(ShardWriter(folder, planned, shard_bytes))
            targets.append(_Target(survivors, writer))
        files = stack.enter_context(Files(checkpoint.folder))
        buffers = _Buffers(4), _Buffers(4)
        for name in order:
            entry = checkpoint.entries[name]
            wanted = [(target, target.pieces[name]) for target in targets if name in target.pieces]
            if not wanted or 0 in entry.shape:
                continue
            for size in _stream(files, entry, wanted, *buffers):
                progress(size)
    for folder, cut in cuts:
        write_json(folder / "config.json", both_spellings(cut_config(cut)))
        copy_side_files(checkpoint.folder, folder)
        if VOCAB in cut.keep:
            cut_tokenizer(folder, cut.keep[VOCAB])
        open_checkpoint(folder)  # the result must satisfy the table as strictly as the source did
    return [target.writer.hashes for target in targets]


def planned_bytes(checkpoint: Checkpoint, cut: Cut) -> int:
    """Bytes of tensors that a cut will write."""
    return sum(item.size for item in _planned(checkpoint, pieces(cut, list(checkpoint.entries))))


def _planned(checkpoint: Checkpoint, survivors: Any) -> list[Planned]:
    return [
        Planned(piece.name, checkpoint.entries[piece.source].dtype, piece.shape)
        for piece in survivors
    ]


def _stream(
    files: Files,
    entry: Entry,
    wanted: list[tuple[_Target, Piece]],
    sources: _Buffers,
    results: _Buffers,
) -> Iterator[int]:
    """Cuts one tensor for every target that wants it; yields the bytes of each block written."""
    rows, *rest = entry.shape or (1,)
    step = max(1, BLOCK_BYTES // entry.row_bytes)
    for target, piece in [one for one in wanted if _sums_rows(one[1])]:
        yield from _summed_rows(files, entry, target, piece, sources, results)
    wanted = [one for one in wanted if not _sums_rows(one[1])]
    for takers in _schedule([piece for _, piece in wanted], rows, step):
        needed = takers[0][1]
        if len(takers) > 1 or (np.diff(needed) <= 0).any():
            needed = np.unique(np.concatenate([index for _, index in takers]))
        block = _read_rows(files, entry, needed, sources)
        values = block.view(_INTEGER[entry.width]).reshape(len(needed), *rest)
        for place, index in takers:
            target, piece = wanted[place]
            mine = values
            if index is not needed and not np.array_equal(index, needed):
                mine = values[np.searchsorted(needed, index)]
            cut = _columns(mine, piece, int(index[0]), entry.dtype, results)
            ticket = target.writer.write(_rescaled(cut, piece, entry.dtype))
            if cut is values:
                sources.lend(target.writer, ticket)
            elif cut is not mine:
                results.lend(target.writer, ticket)
            yield cut.nbytes


def _sums_rows(piece: Piece) -> bool:
    return piece.mix is not None and piece.mix.dim == 0


def _summed_rows(
    files: Files,
    entry: Entry,
    target: _Target,
    piece: Piece,
    sources: _Buffers,
    results: _Buffers,
) -> Iterator[int]:
    """Cuts a tensor whose surviving rows are sums, a block of them at a time."""
    assert piece.mix is not None
    indices_MP, weights_MP = piece.mix.indices_MP, piece.mix.weights_MP
    step = max(1, BLOCK_BYTES // (entry.row_bytes * len(indices_MP)))
    for begin in range(0, indices_MP.shape[1], step):
        own_MP = indices_MP[:, begin : begin + step]
        needed = np.unique(own_MP.numpy())
        block = _read_rows(files, entry, needed, sources)
        values = block.view(_INTEGER[entry.width]).reshape(len(needed), *entry.shape[1:])
        columns = _columns(values, piece, int(needed[0]), entry.dtype, results)
        places_MP = torch.from_numpy(np.searchsorted(needed, own_MP.numpy()))
        summed = _mixed(
            columns, Mix(0, places_MP, weights_MP[:, begin : begin + step]), entry.dtype
        )
        target.writer.write(_rescaled(summed, piece, entry.dtype))
        yield summed.nbytes


def _mixed(values: Block, mix: Mix, dtype: str) -> Block:
    tensor = mixed(torch.from_numpy(values).view(TORCH[dtype]), mix).contiguous()
    result: Block = tensor.view(torch.from_numpy(values[:0]).dtype).numpy()
    return result


def _schedule(wanted: list[Piece], rows: int, step: int) -> Iterator[list[tuple[int, Rows]]]:
    """Which rows are read together, and which of them each piece takes, in the order of its result."""
    kept: list[Rows] = []
    for piece in wanted:
        first = piece.indices[0] if piece.indices else None
        kept.append(np.arange(rows) if first is None else first.numpy())
    apart = any(
        index is not None and index.dim() == 2 for piece in wanted for index in piece.indices
    )
    if all((np.diff(order) > 0).all() for order in kept):
        step = 1 if apart else step
        for begin in range(0, rows, step):
            spans = [np.searchsorted(order, (begin, begin + step)) for order in kept]
            takers = [(i, kept[i][low:high]) for i, (low, high) in enumerate(spans) if high > low]
            if takers:
                yield takers
    elif apart:  # rows in an order of their own, each with columns of its own
        for i, order in enumerate(kept):
            for row in order:
                yield [(i, np.array([row]))]
    else:
        yield list(enumerate(kept))


def _columns(values: Block, piece: Piece, unit: int, dtype: str, results: _Buffers) -> Block:
    """Selects what survives along the dimensions after the first; ``unit`` is the first row's number."""
    for position, index in enumerate(piece.indices):
        if position == 0 or index is None:
            continue
        if piece.mix is not None and piece.mix.dim == position:
            values = _mixed(values, piece.mix, dtype)
            continue
        chosen = (index if index.dim() == 1 else index[unit]).numpy()
        shape = (*values.shape[:position], len(chosen), *values.shape[position + 1 :])
        memory = (
            results.next(int(np.prod(shape)) * values.itemsize).view(values.dtype).reshape(shape)
        )
        # mode="clip" writes straight into the buffer; the positions are known to be inside
        values = np.take(values, chosen, axis=position, out=memory, mode="clip")
    return values


def _rescaled(values: Block, piece: Piece, dtype: str) -> Block:
    if piece.scale == 1.0:
        return values
    tensor = torch.from_numpy(values).view(TORCH[dtype])
    result: Block = rescaled(tensor, piece).reshape(-1).view(torch.uint8).numpy()
    return result


def _read_rows(files: Files, entry: Entry, rows: Rows, buffers: _Buffers) -> Block:
    """Reads ascending rows of a matrix; short gaps between them are read too, long ones are not.

    Shape [rows, row_bytes], uint8; where nothing was read along, the buffer itself.
    """
    row_bytes = entry.row_bytes
    ends = np.flatnonzero((np.diff(rows) - 1) * row_bytes > GAP_BYTES)
    firsts = rows[np.concatenate([[0], ends + 1])]
    lengths = rows[np.concatenate([ends, [len(rows) - 1]])] - firsts + 1
    memory = buffers.next(int(lengths.sum()) * row_bytes)
    filled = 0
    for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
        fill_rows(files, entry, first, memory[filled : filled + length * row_bytes])
        filled += length * row_bytes
    block: Block = memory.reshape(-1, row_bytes)
    if len(block) == len(rows):
        return block
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]])  # rows read before each run
    run = np.searchsorted(firsts, rows, side="right") - 1
    chosen: Block = block[before[run] + rows - firsts[run]]
    return chosen
