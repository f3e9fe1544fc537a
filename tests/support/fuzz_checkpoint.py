"""Seeded generators of damaged model folders: config.json, safetensors headers, indices, tokenizers.

Whatever is in such a folder, opening it ends well or with one ``ValueError`` that names it, in bounded time.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from nemo_minitron.families import families
from nemo_minitron.proofs.tiny_models import tiny_config

Builder = Callable[[Path], None]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 10**9, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "nope", "8", "a/b",
    "\x1b[31mred", "\ud800", "../../x", [], [1], [None] * 4, ["full_attention"] * 4, "M*-E", {}, {"a": {"b": [1]}},
    {"rope_type": "nope"}, {"rope_type": "longrope", "long_factor": 3}, "x" * 10**5, [0] * 10**5,
)  # fmt: skip
"""What a key of a file may be replaced with."""
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "", "nope", 5, None)


def cases(seed: int) -> Iterator[tuple[str, Builder]]:
    """Endless damaged folders, the same for one seed.

    Yields:
        A name, and what makes the folder (an existing, empty one).
    """
    for number in count():
        draw = random.Random(f"{seed}/{number}")
        kind = draw.choice((_config, _header, _bytes, _index, _tokenizer, _text))
        family = draw.choice(sorted(families()))
        changes = draw.choice(families()[family].proofs)
        yield (
            f"{seed}-{number} {kind.__name__[1:]} of {family}",
            lambda folder, kind=kind, draw=draw, family=family, changes=changes: kind(
                folder, draw, tiny_config(families()[family], changes)
            ),
        )


def sound(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Writes a folder whose weights are zeros and all of whose files fit each other; returns the header."""
    from nemo_minitron.families import architecture_of

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, _, shape in architecture_of(config).tensors():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    (folder / "config.json").write_text(json.dumps(config))
    _write(folder / "model.safetensors", header, end)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return header


def _write(path: Path, header: Any, size: int) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(size))


def _config(folder: Path, draw: random.Random, config: dict[str, Any]) -> None:
    """Some keys of config.json are replaced, left out or new."""
    sound(folder, config)
    changed = dict(config)
    new = ("quantization_config", "text_config", "rope_scaling", "rope_parameters", "layer_types", "pad_token_id",
           "tie_word_embeddings", "auto_map", "attn_implementation", "head_dim", "skip_rate")  # fmt: skip
    for _ in range(draw.randint(1, 3)):
        key = draw.choice([*sorted(config), *new])
        if draw.random() < 0.2:
            changed.pop(key, None)
        else:
            changed[key] = draw.choice(VALUES)
    if draw.random() < 0.05:
        changed |= {f"key{i}": i for i in range(draw.choice((1_000, 300_000)))}
    (folder / "config.json").write_text(json.dumps(changed))


def _header(folder: Path, draw: random.Random, config: dict[str, Any]) -> None:
    """Some entries of the safetensors header are replaced, renamed or left out."""
    header = sound(folder, config)
    size = max(item["data_offsets"][1] for name, item in header.items() if name != "__metadata__")
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted(header))
        match draw.choice(("drop", "rename", "value", "dtype", "shape", "offsets", "metadata")):
            case "drop":
                del header[name]
            case "rename":
                header[
                    draw.choice(("module.", "", "\n", "../"))
                    + name
                    + draw.choice(("", ".lora_A", "s"))
                ] = header.pop(name)
            case "value":
                header[name] = draw.choice(VALUES)
            case "metadata":
                header["__metadata__"] = draw.choice(VALUES)
            case part if isinstance(header.get(name), dict):
                chosen = draw.choice(_DTYPES) if part == "dtype" else draw.choice(
                    ([], [0, -4], [2**62, 2**62], [1.0, 2.0], ["a"], None, [0, 10**400], [size - 4, size], [4])
                )  # fmt: skip
                header[name] = {**header[name], {"offsets": "data_offsets"}.get(part, part): chosen}
        if not header:
            break
    _write(folder / "model.safetensors", header, size)


def _bytes(folder: Path, draw: random.Random, config: dict[str, Any]) -> None:
    """Bytes of a file are flipped, cut off or appended."""
    sound(folder, config)
    path = folder / draw.choice(("model.safetensors", "config.json"))
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(min(len(content), 400))] = draw.randrange(256)
    match draw.choice(("keep", "cut", "more")):
        case "cut":
            del content[draw.randrange(len(content)) :]
        case "more":
            content += draw.randbytes(draw.randint(1, 100))
    path.write_bytes(content)


def _index(folder: Path, draw: random.Random, config: dict[str, Any]) -> None:
    """An index beside, or instead of, the one file; its entries lead somewhere else."""
    header = sound(folder, config)
    name = "model.safetensors"
    if draw.random() < 0.7:
        (folder / name).rename(folder / "model-00001-of-00001.safetensors")
        name = "model-00001-of-00001.safetensors"
    weights: Any = dict.fromkeys((key for key in header if key != "__metadata__"), name)
    for key in draw.sample(sorted(weights), k=min(2, len(weights))):
        weights[key] = draw.choice(
            (name, "../x", "/etc/passwd", "a" * 5_000, "x\x00y", "", *VALUES)
        )
    index = draw.choice(
        ({"weight_map": weights}, {"weight_map": draw.choice(VALUES)}, weights, draw.choice(VALUES))
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer(folder: Path, draw: random.Random, config: dict[str, Any]) -> None:
    """Tokenizer and generation settings hold something else; the model itself stays sound."""
    sound(folder, config)
    for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        key = draw.choice(
            (
                "model_input_names",
                "return_dict_in_generate",
                "stop_strings",
                "num_return_sequences",
                "x",
            )
        )
        whole = draw.choice((draw.choice(VALUES), {key: draw.choice(VALUES)}))
        (folder / name).write_text(json.dumps(whole))
    if draw.random() < 0.3:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_bytes(draw.randbytes(20))


def _text(folder: Path, draw: random.Random, config: dict[str, Any]) -> None:
    """A JSON file is other text: nested deeply, not UTF-8, not JSON, not an object."""
    sound(folder, config)
    name = draw.choice(
        (
            "config.json",
            "model.safetensors.index.json",
            "generation_config.json",
            "tokenizer_config.json",
        )
    )
    content = draw.choice((
        b"", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe{}", b"null", b"[]", b"{", b'{"model_type": NaN}', b"1e999",
        b'"' + b"x" * 10**5, draw.randbytes(200), b"\x00" * 50,
    ))  # fmt: skip
    (folder / name).write_bytes(content)
