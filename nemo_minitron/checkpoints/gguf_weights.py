"""The tensors of GGUF files under the names, and in the form, that they have in a Hugging Face folder.

A folder points at its GGUF files (``POINTER``); beside the pointer lie config.json and the tokenizer,
made of the files' metadata. Weights are never copied: numbers are made of their blocks, by the package
gguf, row by row while they are read.
"""

import functools
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_minitron.checkpoints.dtypes import TORCH
from nemo_minitron.checkpoints.gguf_families import Change, dtype_of, gguf_family
from nemo_minitron.checkpoints.gguf_file import Gguf, Stored, gguf_library, read_gguf
from nemo_minitron.checkpoints.gguf_rope import TENSORS
from nemo_minitron.checkpoints.headers import sample_of
from nemo_minitron.checkpoints.tensor_rows import Block, Entry, Files, spans
from nemo_minitron.families import Architecture
from nemo_minitron.security.plain_text import plain

POINTER = "gguf.json"
"""The file of a folder that names its GGUF files, and what their headers were when it was made."""
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PLAIN = {"F32", "F16", "BF16"}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def is_gguf(folder: Path) -> bool:
    """Whether a model's weights lie in GGUF files that its folder points at."""
    return (folder / POINTER).is_file()


def pointed(folder: Path) -> Gguf:
    """The GGUF files that a folder points at.

    Raises:
        ValueError: the pointer is damaged, or a file is gone, damaged or another than it was.
    """
    path = folder / POINTER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        file, digest = Path(content["file"]), str(content["header"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {plain(error, 200)}; remove its folder") from error
    found = read_gguf(file)
    # also: a stranger's folder cannot point at a file of the user's whose header they do not know
    if found.digest != digest:
        raise ValueError(f"{file}: another file than the one that {path} was made for")
    return found


def entries_of(folder: Path, gguf: Gguf, model: Architecture) -> dict[str, Entry]:
    """The tensors of a model, each with how its numbers are made.

    Raises:
        ValueError: the files hold a tensor that no row of the family's table stands for.
    """
    if model.sizes["layers"] > len(gguf.tensors):  # also keeps an absurd config from being expanded
        raise ValueError(
            f"{folder}: {model.sizes['layers']} layers, but only {len(gguf.tensors)} tensors"
        )
    table = gguf_family(model.family.model_type, str(folder))
    dtype, left = _DTYPES[dtype_of(gguf)], {*gguf.tensors} - TENSORS
    found = {}
    for name, _, _ in model.tensors():
        there, expert = gguf_name(table.architecture, model.sizes["layers"], name)
        if there in gguf.tensors:
            left.discard(there)
            change = table.change(name, model.config)
            stored = gguf.tensors[there]
            if expert is not None:
                stored = _expert(stored, expert, model.sizes["experts"], there)
            found[name] = _entry(stored, dtype, change)
    if left:
        raise ValueError(
            f"{gguf.files[0]}: {len(left)} tensors of which family {model.family.model_type!r} has none, as "
            f"{plain(min(left), 80)}"
        )
    return found


def gguf_name(architecture: str, layers: int, name: str) -> tuple[str, int | None]:
    """llama.cpp's name of a tensor (the name itself where it has none), and whose part of it this is.

    In a Hugging Face folder each expert has tensors of its own; in a GGUF file all of a layer lie in
    one, along its first dimension. None: the tensor is no expert's.
    """
    expert = _EXPERT.search(name)
    whole = name if expert is None else _EXPERT.sub(".experts.", name)
    found: str | None = _names(architecture, layers).get_name(
        whole, try_suffixes=(".weight", ".bias")
    )
    return name if found is None else found, None if expert is None else int(expert[1])


def _expert(stored: Stored, expert: int, experts: int, name: str) -> Stored:
    """One expert's part of a tensor that holds all of a layer.

    Raises:
        ValueError: it holds another number of experts.
    """
    if len(stored.shape) < 2 or stored.shape[0] != experts:
        raise ValueError(
            f"{stored.file}: {plain(name, 80)}: expected {experts} experts along the first dimension, found "
            f"shape {list(stored.shape)}"
        )
    library = gguf_library()
    block, width = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(stored.type)]
    size = math.prod(stored.shape[1:]) // block * width
    return replace(stored, start=stored.start + expert * size, shape=stored.shape[1:])


@functools.lru_cache(maxsize=16)
def _names(architecture: str, layers: int) -> Any:
    library = gguf_library()
    known = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    return library.get_tensor_name_map(known[architecture], layers)


def _entry(stored: Stored, dtype: str, change: Change) -> Entry:
    form = gguf_library().GGMLQuantizationType(stored.type).name
    if form == dtype and change == Change():
        return Entry(stored.file, dtype, stored.shape, stored.start)
    return Entry(stored.file, dtype, stored.shape, stored.start, GgufRows(stored, dtype, change))


@dataclass(frozen=True)
class GgufRows:
    """Rows of a tensor in blocks.

    Attributes:
        stored: where it lies.
        dtype: safetensors' name of the dtype that it is read in.
        change: how it is stored otherwise.
    """

    stored: Stored
    dtype: str
    change: Change

    def fill(self, files: Files, first: int, memory: Block) -> None:
        """Fills memory with rows from ``first`` on."""
        shape = self.stored.shape
        row = math.prod(shape[1:])
        out = torch.from_numpy(memory).view(TORCH[self.dtype]).reshape(-1, row)
        for begin, end in spans(len(out), row):
            rows = np.arange(first + begin, first + end)
            places = stored_places(rows, shape[0], self.change)
            values = torch.from_numpy(self._values(files, places, row))
            out[begin:end] = (values - self.change.add).to(out.dtype)

    def _values(self, files: Files, places: Any, row: int) -> Any:
        """Numbers of rows, float32 [rows, row]."""
        library = gguf_library()
        form = library.GGMLQuantizationType(self.stored.type)
        block, width = library.GGML_QUANT_SIZES[form]
        if form.name in _PLAIN or row % block == 0:
            size = row // block * width
            order = np.sort(places)
            memory = np.empty((len(order), size), np.uint8)
            ends = np.flatnonzero(np.diff(order) != 1) + 1
            for part in np.split(np.arange(len(order)), ends):
                run = memory[part[0] : part[-1] + 1]
                files.fill(
                    self.stored.file,
                    self.stored.start + int(order[part[0]]) * size,
                    run.reshape(-1),
                )
            values = library.dequantize(memory, form).reshape(len(order), row)
            return np.ascontiguousarray(values[np.searchsorted(order, places)], np.float32)
        raise ValueError(f"{self.stored.file}: a tensor without rows of whole blocks")


def stored_places(rows: Any, count: int, change: Change) -> Any:
    """Where rows of a tensor of so many lie: row t d/2 + j of a head of d rows is stored as 2 j + t."""
    if not change.interleave:
        return rows
    size = count // change.interleave
    head, inside = np.divmod(rows, size)
    half, place = np.divmod(inside, size // 2)
    return head * size + 2 * place + half


def stamp_of(gguf: Gguf) -> list[Any]:
    """What tells GGUF files from others: their headers, and a sample of every tensor's bytes."""
    library, spans = gguf_library(), dict[str, list[tuple[int, int]]]()
    for stored in gguf.tensors.values():
        block, width = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(stored.type)]
        end = stored.start + math.prod(stored.shape) // block * width
        spans.setdefault(stored.file, []).append((stored.start, end))
    samples = [sample_of(Path(file), sorted(spans[file])) for file in gguf.files if file in spans]
    return ["gguf", gguf.digest, samples]
