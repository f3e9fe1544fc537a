"""How families are written in GGUF and read back: the table ``gguf_families.yaml``, applied."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_minitron.checkpoints.gguf_file import Gguf, gguf_library
from nemo_minitron.checkpoints.gguf_rope import rope_keys, rope_of
from nemo_minitron.families import Architecture, Family, check_sizes, families
from nemo_minitron.families.grammar import evaluate, names_in
from nemo_minitron.security.plain_text import plain

_TABLE = Path(__file__).with_name("gguf_families.yaml")
_PATTERNS = {"five_of_six": (6, 5), "every_second": (2, 1)}
"""Patterns of layers with a window: layer i has one where i modulo the first is below the second."""


@dataclass(frozen=True)
class Change:
    """How a tensor is stored otherwise than in a Hugging Face folder.

    Attributes:
        interleave: heads, the two halves of whose rows lie between each other; 0: none.
        add: what is added to it.
    """

    interleave: int = 0
    add: float = 0.0


@dataclass(frozen=True)
class GgufFamily:
    """A family's rows of the table."""

    model_type: str
    rows: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.rows["architecture"])

    @property
    def recognised_by(self) -> str | None:
        """The key that only files of this one of several families of an architecture have."""
        return str(self.rows["recognised_by"]) if "recognised_by" in self.rows else None

    def change(self, name: str, config: Mapping[str, Any]) -> Change:
        """How a tensor of the Hugging Face folder is stored in GGUF."""
        for row in self.rows["tensors"] if "tensors" in self.rows else ():
            if re.search(row["tensor"] + "$", name):
                heads = config[row["interleave"]] if "interleave" in row else 0
                return Change(heads, float(row["add"]) if "add" in row else 0.0)
        return Change()


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return found


def gguf_families() -> dict[str, GgufFamily]:
    """The families that GGUF files are written and read for, by ``model_type``."""
    return {name: GgufFamily(name, rows) for name, rows in _table()["families"].items()}


def gguf_family(model_type: str, where: str) -> GgufFamily:
    """A family's rows.

    Raises:
        ValueError: the table has none.
    """
    known = gguf_families()
    if model_type not in known:
        raise ValueError(
            f"{where}: family {plain(model_type, 40)!r} is not written as GGUF; expected one of "
            f"{', '.join(sorted(known))}"
        )
    return known[model_type]


def metadata_of(
    table: GgufFamily, config: Mapping[str, Any], where: str
) -> Iterator[tuple[str, str, Any]]:
    """What the metadata of a model says, behind its architecture's name: key, type and value.

    Args:
        table: its family's rows.
        config: its whole configuration, as transformers has it: without a key missing.
        where: what an error message calls the model.

    Raises:
        ValueError: llama.cpp would compute something else; the message names the condition.
    """
    values = _values(config)
    for row in table.rows["require"] if "require" in table.rows else ():
        that, told = (row, row) if isinstance(row, str) else (row["that"], row["told"])
        if not evaluate(that, values):
            raise ValueError(
                f"{where}: cannot be written as GGUF: llama.cpp's {table.architecture} takes for granted: "
                f"{told}; found {_named(that, values)}"
            )
    for key, row in table.rows["keys"].items():
        source = row["is"] if "is" in row else row["as"]
        if "unless" in row and evaluate(row["unless"], values):
            continue
        value = evaluate(source, {source: None, **values} if "optional" in row else values)
        if value is not None:
            yield key, row["type"], value
    yield from rope_keys(
        values, table.rows["scaled_rope"] if "scaled_rope" in table.rows else (), where
    )


def _named(expression: str, values: Mapping[str, Any]) -> str:
    """What the names in an expression stand for."""
    names = sorted(names_in(expression) & values.keys())
    return ", ".join(f"{name}={plain(values[name], 60)}" for name in names)


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What expressions of the table speak of."""
    rope = config.get("rope_parameters") or {}
    full, local = (rope.get(kind, rope) for kind in ("full_attention", "sliding_attention"))
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    found = {
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        **config,
        **{key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full},
        "rope": full,
        "rope_local_base_freq": local.get("rope_theta"),
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "every_fourth": [int(layer % 4 != 3) for layer in range(layers)],
        "no_rope": config.get("no_rope_layers"),
        "num_experts": config.get("num_experts")
        or config.get("num_local_experts"),  # renamed since
        "hidden_act": config.get("hidden_act", config.get("hidden_activation")),
        **{name: _pattern(layers, *pattern) for name, pattern in _PATTERNS.items()},
    }
    if config.get("layer_types"):
        windows = [kind == "sliding_attention" for kind in config["layer_types"]]
        full = [layer for layer, window in enumerate(windows) if not window]
        period = full[0] + 1 if full else layers + 1  # longer than the layers: all have a window
        every = list(range(period - 1, layers, period))
        found |= {"windows": windows, "window_period": period}
        found |= {"full_attention": full, "every_nth": every}
    return found


def _pattern(layers: int, period: int, windows: int) -> list[bool]:
    return [layer % period < windows for layer in range(layers)]


def config_of(gguf: Gguf, where: str) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    Raises:
        ValueError: its architecture is not read here, or a key is missing, unknown or contradicts
            the others.
    """
    known = [table for table in gguf_families().values() if table.architecture == gguf.architecture]
    if not known:
        every = sorted({table.architecture for table in gguf_families().values()})
        raise ValueError(
            f"{where}: architecture {plain(gguf.architecture, 40)!r} is not read from GGUF; expected one of "
            f"{', '.join(every)}"
        )
    matching = [
        table for table in known if gguf.metadata.get(f"{gguf.architecture}.{table.recognised_by}")
    ]
    faults = []
    for table in matching or [table for table in known if table.recognised_by is None] or known:
        config = _config(table, gguf, where)
        family = families()[table.model_type].for_config(config)
        try:
            check_sizes(family, Architecture(family, config, where).sizes, where)
        except ValueError as error:  # another class of the same architecture may take them
            faults.append(error)
            continue
        return config
    raise faults[0]


def _config(table: GgufFamily, gguf: Gguf, where: str) -> dict[str, Any]:
    prefix = f"{gguf.architecture}."
    given = {
        key.removeprefix(prefix): _short(value)
        for key, value in gguf.metadata.items()
        if key.startswith(prefix)
    }
    if "token_embd.weight" not in gguf.tensors:
        raise ValueError(f"{where}: no tensor token_embd.weight")
    names: dict[str, Any] = {key.replace(".", "_"): value for key, value in given.items()}
    names |= {"tensors": set(gguf.tensors), "None": None}
    config: dict[str, Any] = {"vocab_size": gguf.tensors["token_embd.weight"].shape[0]}
    rows = table.rows
    for key, row in rows["keys"].items():
        if "is" not in row:
            continue
        if key in given:
            config[row["is"]] = given[key]
        elif "absent" in row:
            config[row["is"]] = evaluate(row["absent"], {**names, **config})
        elif "optional" not in row:
            raise ValueError(f"{where}: key {prefix}{key} is missing")
    for key, expression in rows["read"].items() if "read" in rows else ():
        config[key] = evaluate(expression, {**names, **config})
    if "layer_types" in rows:
        config["layer_types"] = _layer_types(rows["layer_types"], given, config, where)
    config |= rope_of(gguf, given, config, where)
    _check_known(table, given, config, f"{where}: {prefix}")
    family: Family = families()[table.model_type]
    tokens = {
        f"{kind}_token_id": gguf.metadata.get(f"tokenizer.ggml.{word}_token_id")
        for kind, word in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    always = rows["always"] if "always" in rows else {}
    named = {"model_type": table.model_type, "architectures": [family.architecture]}
    return {**named, **config, **always, **tokens, "dtype": dtype_of(gguf)}


def _layer_types(
    row: Mapping[str, str], given: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> list[str]:
    layers, pattern = config["num_hidden_layers"], given.get(row["key"])
    if type(pattern) is int and pattern > 0:
        windows = _pattern(layers, pattern, pattern - 1)
    elif pattern is None:
        windows = _pattern(layers, *_PATTERNS[row["absent"]])
    elif isinstance(pattern, list) and len(pattern) == layers:
        windows = [bool(window) for window in pattern]
    else:
        raise ValueError(f"{where}: {row['key']}: expected {layers} entries, found {pattern!r:.80}")
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _check_known(
    table: GgufFamily, given: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> None:
    """Refuses keys that would be passed over, and those that contradict the configuration."""
    rows, stated = table.rows["keys"], _table()["shared"]["stated"]
    read = table.rows["read"].values() if "read" in table.rows else ()
    used = {word for expression in read for word in re.findall(r"\w+", expression)}
    pattern = {table.rows["layer_types"]["key"]} if "layer_types" in table.rows else set()
    values = {"partial_rotary_factor": 1.0, **config}
    values.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key, value in given.items():
        if (key in rows and "is" in rows[key]) or key in pattern or key.startswith("rope.scaling."):
            continue
        if key.replace(".", "_") in used:
            continue
        if key not in rows and key not in stated:
            raise ValueError(
                f"{where}{plain(key, 80)}={plain(value, 80)} is not known here, and may change what the "
                "model computes; convert the file with another tool"
            )
        want = evaluate(rows[key]["as"] if key in rows else stated[key], values)
        if value != want:
            raise ValueError(f"{where}{key}: expected {want}, found {plain(value, 40)}")


def _short(value: Any) -> Any:
    """A float32 of the metadata as the shortest number that it stands for: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def is_router(name: str) -> bool:
    """Whether a tensor of a GGUF file says which experts a token is sent to: it is float32 in every file."""
    return ".ffn_gate_inp" in name


def dtype_of(gguf: Gguf) -> str:
    """The dtype that a model's weights are read in: the file's, and bfloat16 where they are quantised."""
    library = gguf_library()
    matrices = {name: stored for name, stored in gguf.tensors.items() if len(stored.shape) > 1}
    forms = {stored.type for name, stored in matrices.items() if not is_router(name)}
    names = {library.GGMLQuantizationType(form).name for form in forms}
    return {"F32": "float32", "F16": "float16"}.get(
        names.pop() if len(names) == 1 else "", "bfloat16"
    )
