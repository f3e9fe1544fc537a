"""Opens Hugging Face checkpoints without reading weights, and checks them against the family's table."""

import errno
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.checkpoints.dequantised import dequantised, quantisation_of
from nemo_minitron.checkpoints.dtypes import FLOATS, STORED, TORCH
from nemo_minitron.checkpoints.gguf_file import types_of
from nemo_minitron.checkpoints.gguf_weights import entries_of, is_gguf, pointed, stamp_of
from nemo_minitron.checkpoints.headers import read_header, sample
from nemo_minitron.checkpoints.hf_config import raw_config, read_config
from nemo_minitron.checkpoints.side_files import processor_files, side_files, side_name
from nemo_minitron.checkpoints.surroundings import Surroundings, apart
from nemo_minitron.checkpoints.tensor_rows import Entry, Files, fill_rows
from nemo_minitron.checkpoints.unsupported_weights import (
    check_config,
    check_folder,
    check_names,
    check_renamed,
)
from nemo_minitron.families import (
    Architecture,
    Family,
    architecture_of,
    find_row,
    own_tables,
    predicts,
)
from nemo_minitron.families.grammar import row_axes
from nemo_minitron.security.links import refuse_links
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.manifest import digest, hash_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST = 255
"""Bytes of the longest name that a file can have."""
_BLOCK = 2**22
"""Bytes compared at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: config and headers, no weights.

    Attributes:
        folder: where it lies.
        architecture: its config.json and its family's table.
        entries: tensor name to entry; without a head that repeats the embedding which it is tied to.
        fingerprint: SHA-256 of weight files' names, sizes and headers, of a sample of every
            tensor's bytes (two fine-tunes of one model differ in nothing else), config.json and
            side files.
        around: the other parts where the causal LM is part of a multimodal model; its own tensors are
            named as it would name them alone.
        stored_as: what its weights were before they are read as plain ones, in words; empty: plain.
        predictions: tensors of prediction layers (MTP) by their names on disk; only export reads them.
    """

    folder: Path
    architecture: Architecture
    entries: Mapping[str, Entry]
    fingerprint: str
    stored_as: str = ""
    around: Surroundings | None = None
    predictions: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""
        return self.architecture.config

    @property
    def family(self) -> Family:
        """Its family's table."""
        return self.architecture.family

    def units(self, name: str) -> dict[str, int]:
        """Unit numbers in a tensor's name, by placeholder."""
        found = find_row(self.family, name)
        return {} if found is None else found[1]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a Hugging Face folder and checks that it is whole and that its family's table describes it.

    Reads config.json and the safetensors headers only.

    Raises:
        ValueError: no config.json, no safetensors weights, a missing or truncated shard, an unknown
            family, tensors that the table does not know or that have another shape, quantised
            weights; each with file and names.
    """
    check_folder(folder)
    refuse_links(folder)
    config, stored = read_config(folder), raw_config(folder)
    model = architecture_of(config, str(folder / "config.json"))
    check_config(folder, stored)
    check_config(folder, config)
    every, stamp, words = _stored(folder, stored, model)
    around, every = apart(folder, stored, every)
    model = replace(model, family=model.family.spelled(every))
    layers = model.sizes["layers"]
    predictions = {
        name: entry for name, entry in every.items() if predicts(model.family, name, layers)
    }
    _check_dtypes(folder, predictions, every)
    entries = {name: entry for name, entry in every.items() if name not in predictions}
    expected = _check_entries(folder, model, entries)
    _check_tied(folder, model, entries, expected)
    held = {
        name: entry
        for name, entry in entries.items()
        if name in expected or find_row(model.family, name) is None
    }
    # a GGUF file's tokenizer was made of it, by whatever version of transformers
    own = [] if is_gguf(folder) else side_files(folder)
    own += [] if around is None else processor_files(folder)
    sides = [[side_name(path, folder), hash_file(path)] for path in own]
    table = [] if model.family.model_type not in own_tables() else [repr(model.family)]
    fingerprint = digest([stamp, stored, sides, *table])
    return Checkpoint(folder, model, held, fingerprint, words, around, predictions)


def _stored(
    folder: Path, config: Mapping[str, Any], model: Architecture
) -> tuple[dict[str, Entry], list[Any], str]:
    """A folder's tensors, what tells its files from others, and in words what its weights are stored as."""
    if is_gguf(folder):
        gguf = pointed(folder)
        words = f"GGUF, {types_of(list(gguf.tensors.values()))}"
        return entries_of(folder, gguf, model), [stamp_of(gguf)], words
    entries, stamp = _safetensors(folder)
    quantisation = quantisation_of(folder, config)
    words = "" if quantisation is None else quantisation.words
    return dequantised(folder, quantisation, entries), stamp, words


def _safetensors(folder: Path) -> tuple[dict[str, Entry], list[Any]]:
    """The stored tensors of a folder, and what tells its files from others."""
    files = weight_files(folder)
    headers = {}
    entries: dict[str, Entry] = {}
    for file in files:
        headers[file], data = read_header(folder / file)
        for name, item in headers[file].items():
            if name == "__metadata__":
                continue
            if name in entries:
                raise ValueError(
                    f"{folder}: {plain(name, 120)} is in two shards, {entries[name].file} and {file}"
                )
            entries[name] = Entry(
                file, item["dtype"], tuple(item["shape"]), data + item["data_offsets"][0]
            )
    stamp = [
        [
            file,
            (folder / file).stat().st_size,
            digest(headers[file]),
            sample(folder / file, headers[file]),
        ]
        for file in files
    ]
    return entries, stamp


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a checkpoint, in order.

    Raises:
        ValueError: there are none (pickles are refused by name), or one that the index lists is
            missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            outside = [file for file in files if Path(file).name != file or len(file) > _LONGEST]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error!r:.200}") from error
        if outside or not files:
            raise ValueError(
                f"{index}: expected names of files beside it, found {plain(outside[:1], 80)}"
            )
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: shard {plain(missing[0], 80)} is listed in {INDEX} but missing "
                f"({len(missing)} missing)"
            )
        if (folder / SINGLE).is_file() and SINGLE not in files:
            raise ValueError(
                f"{folder}: two sets of weights, {SINGLE} and those that {INDEX} lists; transformers reads "
                "the first, others the second: remove one"
            )
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickles:
        raise ValueError(
            f"{folder}: only pickled weights ({pickles[0]}), which can run code when loaded; "
            "convert them to safetensors first (model.save_pretrained writes safetensors)"
        )
    raise ValueError(f"{folder}: no safetensors weights ({SINGLE} or {INDEX})")


def _check_entries(
    folder: Path, model: Architecture, entries: Mapping[str, Entry]
) -> Mapping[str, tuple[int, ...]]:
    """The shapes that config.json implies, by name, found to be those of the files."""
    family, sizes = model.family, model.sizes
    model.check_lists()
    if sizes["layers"] > len(entries):  # also keeps an absurd config from being expanded
        raise ValueError(
            f"{folder / 'config.json'}: {sizes['layers']} layers, but only {len(entries)} tensors"
        )
    # one more than there are is enough to find one that is missing
    first = itertools.islice(model.tensors(), len(entries) + 1)
    expected = {name: shape for name, _, shape in first}
    unknown = sorted(name for name in set(entries) - set(expected) if not _is_surplus(family, name))
    check_names(folder, unknown, sizes["layers"])
    missing = sorted(set(expected) - set(entries))
    check_renamed(folder, unknown, missing)
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors of family {family.model_type!r} are missing: {missing[0]}"
        )
    if unknown:
        reason = (
            "that config.json does not ask for"
            if find_row(family, unknown[0])
            else "in no row of the table"
        )
        raise ValueError(
            f"{folder}: {len(unknown)} tensors {reason} of family {family.model_type!r}: "
            f"{plain(unknown[0], 200)}"
        )
    _check_dtypes(folder, expected, entries)
    for name, shape in expected.items():
        if entries[name].shape != shape:
            found = list(entries[name].shape)
            raise ValueError(
                f"{folder}: {name}: config.json implies shape {list(shape)}, the file holds {found}"
            )
    return expected


def _check_dtypes(folder: Path, names: Iterable[str], entries: Mapping[str, Entry]) -> None:
    """Refuses tensors of numbers that are no floats."""
    for name in names:
        if entries[name].dtype not in FLOATS:
            raise ValueError(
                f"{folder}: {plain(name, 200)} is stored as {plain(entries[name].dtype, 40)}; "
                "dequantise the model first"
            )


def _is_surplus(family: Family, name: str) -> bool:
    """Whether a checkpoint may hold a tensor that its config does not imply: a tied head, old buffers."""
    found = find_row(family, name)
    if found is not None and found[0].when is not None and "vocab" in row_axes(found[0].dims):
        return True
    return any(pattern.fullmatch(name) for pattern in family.ignored)


def _check_tied(
    folder: Path, model: Architecture, entries: Mapping[str, Entry], expected: Mapping[str, Any]
) -> None:
    """Refuses a head that config.json ties to the embedding while the file holds another one.

    transformers 5 leaves the two apart where their values differ; 4.57 and other readers tie them,
    so that one folder would be two models.
    """
    for name in sorted(set(entries) - set(expected)):
        row = find_row(model.family, name)
        twins = [
            other.pattern
            for other in model.family.rows
            if row is not None and other.dims == row[0].dims and other.pattern in expected
        ]
        for twin in twins:
            if not _same_bytes(folder, entries[name], entries[twin]):
                raise ValueError(
                    f"{folder / 'config.json'}: tie_word_embeddings says that {name} is {twin}, but "
                    f"{entries[name].file} holds another {name}; set tie_word_embeddings to false if the "
                    "head was trained apart, or save the model without it"
                )


def _same_bytes(folder: Path, one: Entry, other: Entry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.decoder is not None or other.decoder is not None:
        return _same_rows(folder, one, other)
    places = []
    for entry in (one, other):
        state = (folder / entry.file).stat()
        places.append((folder / entry.file, entry.start, state.st_size, state.st_mtime_ns))
    return _equal_spans(places[0], places[1], one.size)


def _same_rows(folder: Path, one: Entry, other: Entry) -> bool:
    """Whether two tensors of one shape hold the same numbers, of which some are made while they are read."""
    step = max(1, _BLOCK // max(1, one.row_bytes))
    with Files(folder) as files:
        for begin in range(0, one.shape[0], step):
            count = min(step, one.shape[0] - begin)
            left, right = (np.empty(count * one.row_bytes, np.uint8) for _ in range(2))
            fill_rows(files, one, begin, left)
            fill_rows(files, other, begin, right)
            if not np.array_equal(left, right):
                return False
    return True


@functools.lru_cache(maxsize=16)
def _equal_spans(
    one: tuple[Path, int, int, int], other: tuple[Path, int, int, int], size: int
) -> bool:
    """Whether two spans of files are equal; a checkpoint is opened often, and a head is large."""
    with one[0].open("rb") as first, other[0].open("rb") as second:
        first.seek(one[1])
        second.seek(other[1])
        for begin in range(0, size, _BLOCK):
            count = min(_BLOCK, size - begin)
            if first.read(count) != second.read(count):
                return False
    return True


def load_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Reads one tensor into its own memory.

    Raises:
        ValueError: the file ends early.
    """
    return read_entry(checkpoint.folder, checkpoint.entries[name], name)


def read_entry(folder: Path, entry: Entry, name: str) -> Tensor:
    """Reads one tensor by its place. The file is not mapped, so none of its pages stay resident.

    Raises:
        ValueError: the file ends early.
    """
    memory = torch.empty(entry.size, dtype=torch.uint8)
    with Files(folder) as files:
        try:
            fill_rows(files, entry, 0, memory.numpy())
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise ValueError(f"{folder / entry.file}: ends early, in {plain(name, 120)}") from error
    return memory.view(TORCH[entry.dtype]).reshape(entry.shape)


def main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of a model's weights are stored in."""
    counts: Counter[str] = Counter()
    for name, entry in checkpoint.entries.items():
        if find_row(checkpoint.family, name) is not None:
            counts[STORED[entry.dtype]] += math.prod(entry.shape)
    return counts.most_common(1)[0][0]
