"""Scaled rotary embeddings in GGUF: keys ``rope.scaling.*``, and factors as tensors (Llama 3, longrope).

Source: llama.cpp's conversion/base.py (``set_gguf_parameters``), conversion/llama.py and
conversion/phi.py (``generate_extra_tensors``). Llama 3's four numbers are not in the file; they are
found again from the factors that they give.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from nemo_minitron.checkpoints.gguf_file import Gguf

FACTORS = "rope_freqs.weight"
LONG = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
"""Tensors of longrope's factors, and their keys in ``rope_parameters``."""
TENSORS = {FACTORS, *LONG}
_PLAIN = (None, "default")
_YARN = {
    "rope.scaling.yarn_ext_factor": "extrapolation_factor",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_LENGTHS = (8192, 4096, 2048, 16384, 32768, 131072)
Vector = np.ndarray[Any, np.dtype[np.float32]]


def rope_keys(
    values: Mapping[str, Any], kinds: Collection[str], where: str
) -> Iterator[tuple[str, str, Any]]:
    """The keys that say how rotary embeddings are scaled: key, type, value.

    Args:
        values: ``rope`` among them: transformers' ``rope_parameters``, of full attention where they
            differ.
        kinds: those whose factors the architecture reads: ``llama3``, ``longrope``.
        where: what an error message calls the model.

    Raises:
        ValueError: a kind of scaling that is not written.
    """
    rope = values["rope"]
    kind = rope.get("rope_type")
    if kind in _PLAIN or (kind == "llama3" and kind in kinds):
        return
    if kind == "longrope" and kind in kinds:
        usual, asked = _long_attention(values), rope.get("attention_factor")
        if asked is not None and not math.isclose(asked, usual, rel_tol=1e-6):
            raise ValueError(
                f"{where}: attention_factor {asked} cannot be written as GGUF: expected {usual}"
            )
        yield "rope.scaling.attn_factor", "float32", usual
        return
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{where}: rope_type {kind!r} cannot be written as GGUF for this family")
    yield "rope.scaling.type", "string", kind
    yield "rope.scaling.factor", "float32", rope["factor"]
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
        yield "rope.scaling.original_context_length", "uint32", length
        names = {name: key for key, name in _YARN.items()}
        for name, key in names.items():
            if rope.get(name) is not None:
                yield key, "float32", rope[name]


def _long_attention(config: Mapping[str, Any]) -> float:
    """What longrope multiplies queries and keys by, where nothing else is said."""
    length = config["original_max_position_embeddings"]
    scale = config["max_position_embeddings"] / length
    return math.sqrt(1 + math.log(scale) / math.log(length)) if scale > 1 else 1.0


def rope_factors(config: Mapping[str, Any]) -> dict[str, Vector]:
    """Tensors with a factor of each frequency; none where the embedding is not scaled so."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {name: np.array(rope[key], np.float32) for name, key in LONG.items()}
    if rope.get("rope_type") != "llama3":
        return {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {FACTORS: _factors(
        head, rope["rope_theta"], rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )}  # fmt: skip


def _factors(
    head: int, theta: float, factor: float, low: float, high: float, length: int
) -> Vector:
    frequencies = 1.0 / (theta ** (np.arange(0, head, 2, dtype=np.float32) / np.float32(head)))
    found = []
    for frequency in frequencies:
        wave = 2 * math.pi / float(frequency)
        smooth = (length / wave - low) / (high - low)
        if wave < length / high:
            found.append(1.0)
        elif wave > length / low:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def rope_of(
    gguf: Gguf, given: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """``rope_scaling`` of config.json, as a file's metadata and factors say.

    Raises:
        ValueError: a kind of scaling that is not read.
    """
    # as llama.cpp: linear, unless the file says otherwise, and by no factor
    kind, factor = given.get("rope.scaling.type", "linear"), given.get("rope.scaling.factor", 0.0)
    if FACTORS in gguf.tensors:
        return {"rope_scaling": _llama3(gguf, config, where)}
    if any(name in gguf.tensors for name in LONG):
        return {"rope_scaling": _longrope(gguf, given, config, where)}
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind not in ("linear", "yarn") or not factor:
        raise ValueError(f"{where}: rope.scaling.type {kind!r:.40} is not read from GGUF")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if "rope.scaling.original_context_length" in given:
            length = given["rope.scaling.original_context_length"]
            scaling["original_max_position_embeddings"] = length
        scaling |= {name: given[key] for key, name in _YARN.items() if key in given}
    return {"rope_scaling": scaling}


def _longrope(
    gguf: Gguf, given: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Phi-3's factors, for texts that are longer than it was first trained on, and for others."""
    found: dict[str, Any] = {"rope_type": "longrope"}
    for name, key in LONG.items():
        if name not in gguf.tensors:
            raise ValueError(f"{where}: no tensor {name}")
        found[key] = [float(str(number)) for number in _vector(gguf, name, where)]
    attention = given.get("rope.scaling.attn_factor", 1.0)
    if not math.isclose(attention, _long_attention(config), rel_tol=1e-5):
        found["attention_factor"] = attention
    return found


def _vector(gguf: Gguf, name: str, where: str) -> Vector:
    stored = gguf.tensors[name]
    if stored.type != 0 or len(stored.shape) != 1:
        raise ValueError(f"{where}: {name}: expected a vector of F32")
    return np.fromfile(stored.file, np.float32, stored.shape[0], offset=stored.start)


def _llama3(gguf: Gguf, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The numbers whose factors a file holds: the usual ones of Llama 3, and others near them."""
    found = _vector(gguf, FACTORS, where)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factor = float(found.max(initial=1.0))
    grid = itertools.product((1.0, 2.0), (4.0, 8.0), _LENGTHS)
    for low, high, length in grid:
        if found.shape == (head // 2,):
            made = _factors(head, config["rope_theta"], factor, low, high, length)
            if np.allclose(made, found, rtol=1e-5):
                return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                        "high_freq_factor": high, "original_max_position_embeddings": length}  # fmt: skip
    raise ValueError(
        f"{where}: {FACTORS}: factors that no known setting of Llama 3 gives; use the model's "
        "Hugging Face folder"
    )
