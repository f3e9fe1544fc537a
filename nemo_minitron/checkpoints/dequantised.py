"""Quantised weights, presented as the bfloat16 tensors that they stand for.

Formats: MXFP4 as gpt-oss is published (OCP Microscaling Formats 1.0: 32 numbers of four bits share a
power of two), FP8 with a scale per block (``quant_method: fp8``, DeepSeek-V3 and Qwen3-FP8), and FP8
or INT8 with a scale per tensor, channel, group or block, with or without zero points, as
compressed-tensors writes them. Numbers are made row by row while they are read, and are those of
transformers' own dequantisation (integrations/mxfp4.py and finegrained_fp8.py) and of the package
compressed-tensors. Scales of activations and of the KV cache belong to a runtime and are left out.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.dtypes import FLOATS
from nemo_minitron.checkpoints.hf_config import QUANTISATION
from nemo_minitron.checkpoints.tensor_rows import Block, Entry, Files, spans
from nemo_minitron.checkpoints.unsupported_weights import DEQUANTISE
from nemo_minitron.security.plain_text import plain

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_DENSE = ("dense", None)
_ASIDE = re.compile(
    r"\.(input_scale|input_zero_point|output_scale|output_zero_point|activation_scale|"
    r"[kvq]_scale|[kvq]_zero_point)$"
)
"""Scales of activations and of the KV cache."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of E2M1 by their four bits."""
_SCALES = (*FLOATS, "F8_E8M0")


@dataclass(frozen=True)
class Quantisation:
    """What a config.json says of quantised weights.

    Attributes:
        method: ``mxfp4``, ``fp8`` or ``compressed-tensors``.
        words: what it is, for a card.
        blocks: rows and columns that may share a scale, as it declares them.
    """

    method: str
    words: str
    blocks: tuple[tuple[int, int], ...] = ()


def quantisation_of(folder: Path, config: Mapping[str, Any]) -> Quantisation | None:
    """What config.json declares; None: plain weights.

    Raises:
        ValueError: a format that is not read here; the message names it.
    """
    path = folder / "config.json"
    for key in QUANTISATION:
        if config.get(key) is not None and not config[key]:
            raise ValueError(f"{path}: {key}={config[key]!r}: declares no format; remove the key")
    settings = next((config[key] for key in QUANTISATION if config.get(key)), None)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise _refused(path, settings)
    method = settings.get("quant_method")
    if method == "mxfp4":
        return Quantisation(method, "MXFP4")
    if method == "fp8":
        block = settings.get("weight_block_size")
        if block is None:
            return Quantisation(method, "FP8, one scale per tensor")
        sides = _sides(path, block)
        return Quantisation(method, f"FP8, blocks of {sides[0]} x {sides[1]}", (sides,))
    if method == "compressed-tensors":
        format_ = f"compressed-tensors, {_format(path, settings)}"
        return Quantisation(method, format_, tuple(_declared(path, settings)))
    raise _refused(path, settings.get("quant_method", "quantised"))


def _refused(path: Path, method: object) -> ValueError:
    return ValueError(f"{path}: weights are quantised ({plain(method, 40)}); {DEQUANTISE}")


def _sides(path: Path, block: object) -> tuple[int, int]:
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(side) is int and side > 0 for side in block)
    ):
        raise ValueError(
            f"{path}: quantization_config: expected a block of two whole numbers, as [128, 128], found "
            f"{plain(block, 80)}"
        )
    return block[0], block[1]


def _declared(path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Blocks and groups of weights that a configuration of compressed-tensors declares."""
    for group in _groups(settings):
        weights = group.get("weights")
        if isinstance(weights, Mapping) and weights.get("block_structure"):
            yield _sides(path, list(weights["block_structure"]))
        elif isinstance(weights, Mapping) and weights.get("group_size"):
            yield _sides(path, [1, weights["group_size"]])


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    inside = groups.values() if isinstance(groups, Mapping) else ()
    return [group for group in inside if isinstance(group, Mapping)]


def _format(path: Path, settings: Mapping[str, Any]) -> str:
    """The formats of compressed-tensors that a checkpoint holds, found to be among those that are read."""
    named = {str(part["format"]) for part in (settings, *_groups(settings)) if part.get("format")}
    named -= {"mixed-precision"}
    unread = sorted(named - set(_FORMATS))
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in _DENSE:
        unread.append(str(sparse["format"]))
    transform = settings.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        unread.append("transform_config")  # weights that were rotated
    if unread or not named:
        raise _refused(path, f"compressed-tensors {', '.join(unread) or 'without a format'}")
    return ", ".join(sorted(named))


def dequantised(
    folder: Path, found: Quantisation | None, entries: Mapping[str, Entry]
) -> dict[str, Entry]:
    """The tensors that a checkpoint's stored ones stand for.

    Args:
        folder: the checkpoint.
        found: what its config.json declares; None: the stored tensors are the weights.
        entries: what its files hold.

    Raises:
        ValueError: a scale is missing or left over, or of a shape or dtype that fits no weight.
    """
    if found is None:
        return dict(entries)
    stored = {name: entry for name, entry in entries.items() if not _ASIDE.search(name)}
    if found.method == "mxfp4":
        return _of_mxfp4(folder, stored)
    suffix = "_scale_inv" if found.method == "fp8" else "_scale"
    return _of_scaled(folder, stored, suffix, found)


def _of_mxfp4(folder: Path, stored: dict[str, Entry]) -> dict[str, Entry]:
    result = {}
    for name, entry in stored.items():
        base, _, part = name.rpartition("_")
        if part == "scales" and f"{base}_blocks" in stored:
            continue
        if part not in ("blocks", "scales"):
            result[name] = entry
            continue
        if part == "scales" or f"{base}_scales" not in stored:
            other = "blocks" if part == "scales" else "scales"
            raise _missing(folder, name, f"{base}_{other}")
        scales = stored[f"{base}_scales"]
        fits = len(entry.shape) == 4 and entry.shape[-1] == 16 and entry.shape[:-1] == scales.shape
        if not fits or {entry.dtype, scales.dtype} != {"U8"}:
            raise ValueError(
                f"{folder}: {plain(base, 120)}: expected U8 blocks [experts, rows, groups, 16] and U8 scales "
                f"[experts, rows, groups], found {plain(entry.dtype, 20)} {list(entry.shape)} and "
                f"{plain(scales.dtype, 20)} {list(scales.shape)}"
            )
        experts, rows, groups, _ = entry.shape
        made = Mxfp4(entry, scales)
        result[base] = Entry(entry.file, "BF16", (experts, 32 * groups, rows), entry.start, made)
    return result


def _missing(folder: Path, name: str, other: str) -> ValueError:
    return ValueError(
        f"{folder}: {plain(name, 120)} is there and {plain(other, 120)} is missing; the checkpoint is not "
        "whole: copy it again"
    )


def _of_scaled(
    folder: Path, stored: dict[str, Entry], suffix: str, found: Quantisation
) -> dict[str, Entry]:
    result = {}
    for name, entry in stored.items():
        if name.endswith((suffix, "_zero_point")):
            base = name.removesuffix("_zero_point").removesuffix(suffix)
            if base in stored:
                continue
            if base.endswith("weight"):
                raise _missing(folder, name, base)
            result[name] = entry  # a weight of the model's own, as Gemma 4's per_expert_scale
        elif f"{name}{suffix}" in stored:
            scales, zeros = stored[f"{name}{suffix}"], stored.get(f"{name}_zero_point")
            block = _grid(folder, name, entry, scales, found)
            if zeros is not None and (zeros.shape != scales.shape or zeros.dtype not in _ZEROS):
                raise ValueError(
                    f"{folder}: {plain(name, 120)}: its zero points, {plain(zeros.dtype, 20)} "
                    f"{list(zeros.shape)}, do not fit its scales {list(scales.shape)}"
                )
            made = Scaled(entry, scales, zeros, block, found.method == "fp8")
            result[name] = Entry(entry.file, "BF16", entry.shape, entry.start, made)
        elif entry.dtype in ("F8_E4M3", "I8"):
            raise _missing(folder, name, f"{name}{suffix}")
        else:
            result[name] = entry
    return result


_ZEROS = ("I8", "U8", *_SCALES)


def _grid(
    folder: Path, name: str, entry: Entry, scales: Entry, found: Quantisation
) -> tuple[int, int]:
    """Rows and columns of a matrix that share one scale."""
    types = ("F8_E4M3",) if found.method == "fp8" else ("F8_E4M3", "I8")
    shape, grid = entry.shape, scales.shape
    if entry.dtype in types and scales.dtype in _SCALES and len(shape) in (2, 3):
        rows, columns = shape[-2:]
        if grid in ((), (1,)):
            return rows, columns
        if len(grid) == len(shape) and grid[:-2] == shape[:-2] and 0 not in grid:
            for high, wide in found.blocks:
                if (-(-rows // high), -(-columns // wide)) == grid[-2:]:
                    return high, wide
            even = rows % grid[-2] == 0 and columns % grid[-1] == 0
            if even and (found.method != "fp8" or grid[-2:] == (1, 1)):
                return rows // grid[-2], columns // grid[-1]
    blocks = " or ".join(f"{high} x {wide}" for high, wide in found.blocks)
    raise ValueError(
        f"{folder}: {plain(name, 120)}: its scales, {plain(scales.dtype, 20)} {list(grid)}, do not fit "
        f"{plain(entry.dtype, 20)} {list(shape)}" + (f" in blocks of {blocks}" if blocks else "")
    )


@dataclass(frozen=True)
class Mxfp4:
    """Blocks of 32 numbers of four bits with a power of two: [experts, columns, rows] of bfloat16.

    Attributes:
        blocks: [experts, rows, groups, 16], two numbers to a byte, the lower four bits first.
        scales: [experts, rows, groups], exponents plus 127.
    """

    blocks: Entry
    scales: Entry

    def fill(self, files: Files, first: int, memory: Block) -> None:
        """Fills memory with whole experts from ``first`` on."""
        _, rows, groups, _ = self.blocks.shape
        out = torch.from_numpy(memory).view(torch.bfloat16).reshape(-1, 32 * groups, rows)
        for expert in range(len(out)):
            for begin, end in spans(rows, 32 * groups):
                at, count = ((first + expert) * rows + begin) * groups, (end - begin) * groups
                packed = files.numbers(self.blocks, 16 * at, 16 * count).long()
                exponents = files.numbers(self.scales, at, count).to(torch.int32) - 127
                values = _pairs()[packed].reshape(count, 32)
                torch.ldexp(values, exponents[:, None], out=values)
                out[expert][:, begin:end] = values.reshape(end - begin, -1).T


def _pairs() -> Tensor:
    """[256, 2]: the two numbers of each byte."""
    numbers, byte = torch.tensor(_FP4, dtype=torch.bfloat16), torch.arange(256)
    return torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1)


@dataclass(frozen=True)
class Scaled:
    """(number - zero point) scale, a scale for each block of a matrix or of a stack of matrices.

    Attributes:
        numbers: [rows, columns], or [matrices, rows, columns].
        scales: one for each block.
        zeros: zero points of the scales' shape, or None.
        block: rows and columns of a block; those at the edges may be smaller.
        wide: whether the product is taken in float32; else in the scales' dtype, as
            compressed-tensors does.
    """

    numbers: Entry
    scales: Entry
    zeros: Entry | None
    block: tuple[int, int]
    wide: bool

    def fill(self, files: Files, first: int, memory: Block) -> None:
        """Fills memory with rows, or whole matrices of a stack, from ``first`` on."""
        *stack, rows, columns = self.numbers.shape
        out = torch.from_numpy(memory).view(torch.bfloat16).reshape(-1, columns)
        at = first * (rows if stack else 1)
        done = 0
        while done < len(out):  # a block of scales ends with its matrix
            matrix, row = divmod(at + done, rows)
            count = min(rows - row, len(out) - done)
            for begin, end in spans(count, columns):
                read = files.numbers(
                    self.numbers, (at + done + begin) * columns, (end - begin) * columns
                ).reshape(-1, columns)
                out[done + begin : done + end] = self._values(files, read, matrix, row + begin)
            done += count

    def _values(self, files: Files, read: Tensor, matrix: int, row: int) -> Tensor:
        scales = self._spread(files, self.scales, matrix, row, read.shape)
        dtype = torch.float32 if self.wide or scales.element_size() < 2 else scales.dtype
        values = read.to(dtype)
        if self.zeros is not None:
            values = values - self._spread(files, self.zeros, matrix, row, read.shape).to(dtype)
        return (values * scales.to(dtype)).to(torch.bfloat16)

    def _spread(
        self, files: Files, entry: Entry, matrix: int, row: int, shape: torch.Size
    ) -> Tensor:
        """Scales or zero points of rows from ``row`` on: [rows, columns]."""
        whole, columns = self.numbers.shape[-2:]
        high, wide = self.block
        down, across = -(-whole // high), -(-columns // wide)
        lone = entry.shape in ((), (1,))
        begin, end = row // high, (row + shape[0] - 1) // high + 1
        at = 0 if lone else (matrix * down + begin) * across
        found = files.numbers(entry, at, 1 if lone else (end - begin) * across)
        if lone:
            return found.reshape(1, 1)
        grid = found.reshape(end - begin, across)
        chosen = grid[torch.arange(row, row + shape[0]) // high - begin]
        return chosen if across == 1 else chosen[:, torch.arange(columns) // wide]
