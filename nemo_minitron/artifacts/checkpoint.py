"""Hugging Face checkpoints on disk: opened without reading weights, checked against the table."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_minitron.artifacts.manifest import digest, hash_file
from nemo_minitron.families import Family, axis_sizes, expected_tensors, family_of, find_row
from nemo_minitron.families.grammar import row_axes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json", *LICENCE_FILES)
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its file, safetensors dtype name and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: config and headers, no weights.

    Attributes:
        folder: where it lies.
        config: its config.json.
        family: its family table.
        entries: tensor name to entry.
        fingerprint: SHA-256 of weight files' names, sizes and headers, config.json and side files.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Family
    entries: Mapping[str, Entry]
    fingerprint: str


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a Hugging Face folder and checks that it is whole and that its family's table describes it.

    Reads config.json and the safetensors headers only.

    Raises:
        ValueError: no config.json, no safetensors weights, a missing or truncated shard, an unknown family,
            tensors that the table does not know or that have another shape, quantised weights; each with
            file and names.
    """
    config = read_config(folder)
    family = family_of(config, str(folder / "config.json"))
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method", "quantised") if isinstance(settings, dict) else settings
        raise ValueError(
            f"{folder / 'config.json'}: weights are quantised ({method}); dequantise the model first"
        )
    files = weight_files(folder)
    headers = {file: read_header(folder / file) for file in files}
    entries = {
        name: Entry(file, item["dtype"], tuple(item["shape"]))
        for file, header in headers.items()
        for name, item in header.items()
        if name != "__metadata__"
    }
    _check_entries(folder, family, config, entries)
    stamp = [[file, (folder / file).stat().st_size, digest(headers[file])] for file in files]
    sides = [[name, hash_file(folder / name)] for name in _SIDE_FILES if (folder / name).is_file()]
    return Checkpoint(folder, config, family, entries, digest([stamp, config, sides]))


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        ValueError: the folder or the file is missing, or the file is no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json here; a Hugging Face model folder is expected")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up a checkpoint, in order.

    Raises:
        ValueError: there are none (pickles are refused by name), or one that the index lists is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error!r}") from error
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: shard {missing[0]} is listed in {INDEX} but missing ({len(missing)} missing)"
            )
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder}: only pickled weights ({pickles[0]}), which can run code when loaded; "
            "convert them to safetensors first (model.save_pretrained writes safetensors)"
        )
    raise ValueError(f"{folder}: no safetensors weights ({SINGLE} or {INDEX})")


def read_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file, after checking that the file is as long as its header says.

    Raises:
        ValueError: the file is truncated, has trailing bytes, or its header is not one of safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, 100 * 2**20):
                raise ValueError("header is longer than the file")
            header = json.loads(file.read(length))
        spans = [item["data_offsets"] for name, item in header.items() if name != "__metadata__"]
        shapes = [tuple(item["shape"]) for name, item in header.items() if name != "__metadata__"]
        if not all(isinstance(extent, int) and extent >= 0 for shape in shapes for extent in shape):
            raise ValueError("shapes are not whole numbers")
        end = 8 + length + max((span[1] for span in spans), default=0)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        struct.error,
        RecursionError,
    ) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from error
    if end != size:
        raise ValueError(f"{path}: truncated: expected {end} bytes, found {size}")
    return dict(header)


def _check_entries(
    folder: Path, family: Family, config: Mapping[str, Any], entries: Mapping[str, Entry]
) -> None:
    sizes = axis_sizes(family, config, str(folder / "config.json"))
    for axis in family.indexed:
        if sizes[axis.name] > len(entries):  # also keeps an absurd config from being expanded
            raise ValueError(
                f"{folder / 'config.json'}: {sizes[axis.name]} {axis.name}, but only {len(entries)} tensors"
            )
    expected = {name: shape for name, _, shape in expected_tensors(family, config)}
    missing = sorted(set(expected) - set(entries))
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors of family {family.model_type!r} are missing: {missing[0]}"
        )
    unknown = sorted(name for name in set(entries) - set(expected) if not _is_surplus(family, name))
    if unknown:
        reason = (
            "that config.json does not ask for" if find_row(family, unknown[0]) else "in no row of the table"
        )
        raise ValueError(
            f"{folder}: {len(unknown)} tensors {reason} of family {family.model_type!r}: {unknown[0]}"
        )
    for name, shape in expected.items():
        if entries[name].shape != shape:
            found = list(entries[name].shape)
            raise ValueError(
                f"{folder}: {name}: config.json implies shape {list(shape)}, the file holds {found}"
            )
        if entries[name].dtype not in _FLOATS:
            raise ValueError(
                f"{folder}: {name} is stored as {entries[name].dtype}; dequantise the model first"
            )


def _is_surplus(family: Family, name: str) -> bool:
    """Whether a checkpoint may hold a tensor that its config does not imply: a tied head, old buffers."""
    found = find_row(family, name)
    if found is not None:
        return found[0].when is not None and "vocab" in row_axes(found[0].dims)
    return any(pattern.fullmatch(name) for pattern in family.ignored)


def tensor_reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """A function that maps one tensor at a time from the files; pages are read when touched."""
    handles: dict[str, Any] = {}

    def read(name: str) -> Tensor:
        file = checkpoint.entries[name].file
        if file not in handles:
            try:
                handles[file] = safe_open(checkpoint.folder / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{checkpoint.folder / file}: {error}") from error
        tensor: Tensor = handles[file].get_tensor(name)
        return tensor

    return read


def copy_side_files(source: Path, target: Path) -> None:
    """Copies what belongs to a model besides config and weights.

    Tokenizer, generation config, licence; byte for byte.
    """
    for name in _SIDE_FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 over the tokenizer's files."""
    return digest([[name, hash_file(folder / name)] for name in TOKENIZER_FILES if (folder / name).is_file()])


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spells out dtype and rope settings for transformers 4 and 5 alike.

    transformers 5 writes ``rope_parameters`` and ``dtype``; 4.57 reads ``rope_theta``, ``rope_scaling``,
    ``partial_rotary_factor`` and ``torch_dtype`` and silently falls back to defaults without them.
    """
    written = dict(config)
    for ours, theirs in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        if written.get(ours) is not None and written.get(theirs) is None:
            written[theirs] = written[ours]
    rope = written.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        written.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            written.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        if scaling.get("rope_type", "default") != "default":
            written.setdefault("rope_scaling", scaling)
    return written
