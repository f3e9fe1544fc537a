"""gguf: an export as GGUF files, with the names and metadata that llama.cpp's converter writes.

One tensor is in memory at a time. A file that is finished is read back as a source is, and compared
tensor by tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.dtypes import TORCH
from nemo_minitron.checkpoints.gguf_families import (
    Change,
    config_of,
    gguf_family,
    is_router,
    metadata_of,
)
from nemo_minitron.checkpoints.gguf_file import gguf_library, read_gguf
from nemo_minitron.checkpoints.gguf_rope import rope_factors
from nemo_minitron.checkpoints.gguf_weights import entries_of, gguf_name, stored_places
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.tensor_rows import Entry, Files, fill_rows, spans
from nemo_minitron.families import Architecture, architecture_of
from nemo_minitron.models.config_trial import config_object
from nemo_minitron.release.gguf_tokenizer import add_tokenizer, check_tokenizer

KINDS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""Types of weights, and llama.cpp's numbers of files of them (``LlamaFileType``)."""
_METHODS = {"uint32": "UINT32", "float32": "FLOAT32", "bool": "BOOL", "string": "STRING"}


def check_gguf(
    checkpoint: Checkpoint, kinds: Sequence[str], pre: str | None, source: Path | None = None
) -> None:
    """Refuses a model, or types, that no GGUF file can be written of.

    Args:
        checkpoint: the model.
        kinds: types of its weights.
        pre: llama.cpp's name of its pre-tokenizer, where the user gives it.
        source: the model that it was made of; None: it is one itself.

    Raises:
        ValueError: there is none.
    """
    gguf_library()
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong or len(set(kinds)) != len(kinds):
        raise ValueError(
            f"export.gguf: expected different types of {', '.join(KINDS)}, found {', '.join(kinds)}"
        )
    where = f"export.gguf: {checkpoint.folder}"
    table = gguf_family(checkpoint.family.model_type, where)
    list(metadata_of(table, _whole(checkpoint.config), where))
    vocabulary = checkpoint.architecture.sizes["vocab"]
    check_tokenizer(checkpoint.folder, source or checkpoint.folder, vocabulary, pre)


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without a key missing."""
    found: dict[str, Any] = config_object(both_spellings(config)).to_dict()
    return {**found, "vocab_size": config["vocab_size"]}


def write_gguf(
    folder: Path,
    source: Path,
    name: str,
    kinds: Sequence[str],
    pre: str | None,
    licence: str | None,
) -> dict[str, Path]:
    """Writes ``NAME-TYPE.gguf`` for each type beside a model's files, and compares them with it.

    Args:
        folder: the model, a Hugging Face folder.
        source: the model that it was made of.
        name: what the files are called.
        kinds: types of the weights.
        pre: llama.cpp's name of the pre-tokenizer, or None.
        licence: id of its licence, where it has one.

    Raises:
        ValueError: see ``check_gguf``.
        RuntimeError: a file does not hold what the model does.
    """
    checkpoint = open_checkpoint(folder)
    config, table = (
        _whole(checkpoint.config),
        gguf_family(checkpoint.family.model_type, str(folder)),
    )
    found = {}
    for kind in kinds:
        path = folder / f"{name}-{kind.upper()}.gguf"
        writer = gguf_library().GGUFWriter(path, table.architecture)
        try:
            writer.add_type("model")
            writer.add_name(name)
            if licence:
                writer.add_license(licence)
            for key, form, value in metadata_of(table, config, str(folder)):
                _add(writer, f"{table.architecture}.{key}", form, value)
            writer.add_file_type(KINDS[kind])
            writer.add_quantization_version(gguf_library().GGML_QUANT_VERSION)
            add_tokenizer(writer, folder, source, config, pre)
            _write_tensors(writer, checkpoint, config, kind)
        finally:
            writer.close()
        _compare(path, checkpoint)
        found[kind] = path
    return found


def _add(writer: Any, key: str, form: str, value: Any) -> None:
    types = gguf_library().GGUFValueType
    kinds = {"uint32": int, "float32": float, "bool": bool, "string": str}
    writer.add_key_value(key, kinds[form](value), types[_METHODS[form]])


def _write_tensors(
    writer: Any, checkpoint: Checkpoint, config: Mapping[str, Any], kind: str
) -> None:
    """Writes the table of tensors, then one tensor after the other."""
    library = gguf_library()
    table = gguf_family(checkpoint.family.model_type, str(checkpoint.folder))
    layers = checkpoint.architecture.sizes["layers"]
    stacks: dict[
        str, list[str]
    ] = {}  # llama.cpp's name: ours, of all experts of a layer where it is theirs
    for name, _, _ in checkpoint.architecture.tensors():
        stacks.setdefault(gguf_name(table.architecture, layers, name)[0], []).append(name)
    factors = rope_factors(config)
    for there, vector in factors.items():
        writer.add_tensor_info(there, vector.shape, vector.dtype, vector.nbytes)
    for there, names in stacks.items():
        entry = checkpoint.entries[names[0]]
        form = _form(there, entry, kind)
        block, width = library.GGML_QUANT_SIZES[form]
        shape = (*entry.shape[:-1], entry.shape[-1] // block * width)
        if gguf_name(table.architecture, layers, names[0])[1] is not None:
            shape = (len(names), *shape)
        writer.add_tensor_info(there, shape, np.dtype(np.uint8), int(np.prod(shape)), form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for vector in factors.values():
        writer.write_tensor_data(vector)
    with Files(checkpoint.folder) as files:
        for there, names in stacks.items():
            parts = []
            for name in names:
                entry = checkpoint.entries[name]
                change = table.change(name, checkpoint.architecture.values)
                parts.append(_encoded(files, entry, change, _form(there, entry, kind)))
            writer.write_tensor_data(np.concatenate(parts) if len(parts) > 1 else parts[0])


def _form(there: str, entry: Entry, kind: str) -> Any:
    """The ggml type of a tensor: vectors and routers are float32, rows that are no whole blocks float16."""
    types = gguf_library().GGMLQuantizationType
    if len(entry.shape) < 2 or is_router(there):
        return types.F32
    form = types[kind.upper()]
    whole = entry.shape[-1] % gguf_library().GGML_QUANT_SIZES[form][0] == 0
    return form if whole else types.F16


def _encoded(files: Files, entry: Entry, change: Change, form: Any) -> Any:
    """A tensor's bytes in a GGUF file, uint8, flat."""
    library = gguf_library()
    row = int(np.prod(entry.shape[1:], dtype=np.int64))
    block, width = library.GGML_QUANT_SIZES[form]
    out = np.empty((entry.shape[0], row * width // block), np.uint8)
    places = stored_places(np.arange(entry.shape[0]), entry.shape[0], change)
    for begin, values in _rows(files, entry):
        numbers = values.float().numpy() + np.float32(change.add)
        at = places[begin : begin + len(numbers)]
        if row % block == 0:
            out[at] = library.quantize(numbers, form).view(np.uint8).reshape(len(numbers), -1)
    return out.reshape(-1)


def _rows(files: Files, entry: Entry) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor's rows in pieces: the first row, and [rows, numbers]."""
    row = int(np.prod(entry.shape[1:], dtype=np.int64))
    for begin, end in spans(entry.shape[0], row):
        memory = np.empty((end - begin) * entry.row_bytes, np.uint8)
        fill_rows(files, entry, begin, memory)
        yield begin, torch.from_numpy(memory).view(TORCH[entry.dtype]).reshape(-1, row)


def _compare(path: Path, checkpoint: Checkpoint) -> None:
    """Compares a file, read as a source is, with the model that it was written of.

    Raises:
        RuntimeError: a tensor is missing or another one, or the metadata describes another model.
    """
    gguf = read_gguf(path.resolve())  # its tensors name the file, which is looked for beside itself
    _compare_sizes(path, config_of(gguf, str(path)), checkpoint)
    entries = entries_of(path.parent, gguf, Architecture(checkpoint.family, checkpoint.config))
    for name, _, _ in checkpoint.architecture.tensors():
        if name not in entries or entries[name].shape != checkpoint.entries[name].shape:
            raise RuntimeError(f"{path}: {name} is missing, or of another shape")
        with Files(checkpoint.folder) as ours, Files(path.parent) as theirs:
            pairs = zip(
                _rows(ours, checkpoint.entries[name]), _rows(theirs, entries[name]), strict=True
            )
            for (_, want), (_, found) in pairs:
                if not _close(want.float(), found.float(), path):
                    raise RuntimeError(f"{path}: {name} is not what {checkpoint.folder} holds")


def _compare_sizes(path: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Compares what a file's metadata says of the model with the model that it was written of.

    A program that reads the file knows nothing else: it takes the tensors' shapes, and the layers'
    windows, from there.

    Raises:
        RuntimeError: it says something else.
    """
    ours, theirs = checkpoint.architecture.sizes, architecture_of(config, str(path)).sizes
    pairs = {name: (size, theirs.get(name)) for name, size in ours.items()}
    if "layer_types" in config:
        pairs["layer_types"] = (_whole(checkpoint.config)["layer_types"], config["layer_types"])
    for name, (want, found) in pairs.items():
        if want != found:
            raise RuntimeError(
                f"{path}: its metadata says {name} {found}, and {checkpoint.folder} has {want}"
            )


def _close(want: torch.Tensor, found: torch.Tensor, path: Path) -> bool:
    """Whether numbers are equal, up to what their type in the file can tell apart."""
    steps = {"F32": 2.0**-7, "F16": 2.0**-7, "BF16": 2.0**-7, "Q8_0": 1 / 120}
    step = steps[path.stem.rpartition("-")[2]]
    largest = want.abs().amax(1, keepdim=True) if want.shape[1] > 1 else want.abs().max()
    rounded = 2.0**-22  # of a norm's weight, which is stored with one added
    return bool(((want - found).abs() <= step * largest + rounded).all())
