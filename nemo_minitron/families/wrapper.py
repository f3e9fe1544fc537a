"""A causal LM inside a multimodal model: where its configuration and its tensors lie.

The text model is what is scored, cut and distilled. Of the other parts only those tensors change
that have the text model's hidden channels along a dimension; a table names them.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.families.architecture import architecture_of
from nemo_minitron.families.grammar import Row, parse_row
from nemo_minitron.families.table import read_yaml
from nemo_minitron.security.plain_text import plain

TABLES = Path(__file__).parent / "wrappers"
TEXT = "text_config"
"""Key of a multimodal model's config.json that holds the text model's configuration."""
_SHARED = (
    "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Keys of the whole model's config.json that hold for the text model where its own part lacks them."""
_KEYS = {
    "model_type", "architecture", "text", "defaults", "names", "tied", "tensors", "inner", "config",
    "set_aside", "proof",
}  # fmt: skip


@dataclass(frozen=True)
class Wrapper:
    """What cutting needs to know about a multimodal model.

    Attributes:
        model_type, architecture: as in its config.json.
        text: ``model_type`` of the text part to the family that describes it.
        defaults: what the text part's class in transformers takes for keys that config.json lacks.
        names: first part of a tensor's name on disk to what the text model calls it.
        tied: whether the head is tied to the embedding where config.json does not say.
        rows: patterns of the other tensors that have the hidden channels along a dimension, and
            their dimensions; ``any`` is a dimension that stays.
        inner: names of dimensions that are as long as there are hidden channels, and whose units are
            the other part's own: which of them stay is decided by their own weights.
        config: keys, with dots, of the other parts' configuration that hold the size of an axis.
        set_aside: keys of the text part that mean nothing to the text model alone (how the
            positions of an image are counted).
        proof: a tiny model's other parts and an image for it (``proofs/wrapper_proof.py``).
    """

    model_type: str
    architecture: str
    text: Mapping[str, str]
    defaults: Mapping[str, Any]
    names: Mapping[str, str]
    tied: bool
    rows: tuple[tuple[re.Pattern[str], Row], ...]
    inner: tuple[str, ...]
    config: Mapping[str, str]
    set_aside: tuple[str, ...]
    proof: Mapping[str, Any]

    def text_name(self, name: str) -> str | None:
        """A tensor's name in the text model alone, or None where it belongs to another part."""
        for stored, inside in self.names.items():
            if name.startswith(stored):
                return inside + name.removeprefix(stored)
        return None

    def stored_name(self, name: str, like: Iterable[str]) -> str:
        """A text model's tensor's name on disk.

        Args:
            name: its name in the text model alone.
            like: names on disk of a checkpoint whose spelling is to be used.
        """
        used = [stored for stored in self.names if any(other.startswith(stored) for other in like)]
        for stored in [*used, *self.names]:
            if name.startswith(self.names[stored]):
                return stored + name.removeprefix(self.names[stored])
        raise AssertionError(f"no row of 'names' leads to {name}")

    def row(self, name: str) -> Row | None:
        """Dimensions of another part's tensor that has hidden channels; None: it has none."""
        return next((dims for pattern, dims in self.rows if pattern.fullmatch(name)), None)


def load_wrapper(path: Path) -> Wrapper:
    """Reads one table.

    Raises:
        ValueError: unknown keys, or rows that do not parse.
    """
    table = read_yaml(path.read_text(encoding="utf-8"))
    if set(table) - _KEYS:
        raise ValueError(f"{path}: unknown keys {sorted(set(table) - _KEYS)}")
    return Wrapper(
        table["model_type"],
        table["architecture"],
        table["text"],
        table.get("defaults", {}),
        table["names"],
        table["tied"],
        tuple((_pattern(name), parse_row(dims)) for name, dims in table["tensors"].items()),
        tuple(table.get("inner", ())),
        table.get("config", {}),
        tuple(table.get("set_aside", ())),
        table["proof"],
    )


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", name)
    return re.compile(r"\d+".join(re.escape(part) for part in parts))


@functools.cache
def wrappers() -> Mapping[str, Wrapper]:
    """All tables by ``model_type``."""
    loaded = map(load_wrapper, sorted(TABLES.glob("*.yaml")))
    return {wrapper.model_type: wrapper for wrapper in loaded}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """The table of a multimodal model; None: config.json is that of a causal LM, or not known."""
    if not isinstance(config.get(TEXT), Mapping):
        return None
    return wrappers().get(str(config.get("model_type")))


def text_config(wrapper: Wrapper, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of the text model alone, with every size written out.

    Args:
        wrapper: the table of the whole model.
        config: the whole model's config.json.
        where: what an error message calls it.

    Raises:
        ValueError: the text model is of a kind that the table, or no family, knows; a size is
            missing.
    """
    inner = config[TEXT]
    kind = str(inner.get("model_type", wrapper.defaults.get("model_type")))
    if kind not in wrapper.text:
        raise ValueError(
            f"{where}: {TEXT}.model_type: expected one of {', '.join(wrapper.text)} inside "
            f"{wrapper.model_type}, found {plain(kind, 80)!r}"
        )
    given = {key: value for key, value in inner.items() if value is not None}
    alone = {**inner, **wrapper.defaults, **given, "model_type": wrapper.text[kind]}
    for key in _SHARED:
        if alone.get(key) is None and config.get(key) is not None:
            alone[key] = config[key]
    said = [
        part["tie_word_embeddings"] for part in (config, given) if "tie_word_embeddings" in part
    ]
    alone["tie_word_embeddings"] = said[0] if said else wrapper.tied
    alone = _without(alone, wrapper.set_aside)
    model = architecture_of(alone, f"{where}: {TEXT}")
    alone["architectures"] = [model.family.architecture]
    return dict(model.resized(model.sizes).config, architectures=alone["architectures"])


def _without(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A configuration without some keys, also of the parts one level down."""
    gone = set(keys)
    return {
        key: {k: v for k, v in value.items() if k not in gone} if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in gone
    }


def with_text(
    wrapper: Wrapper,
    config: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """The whole model's config.json around another text model.

    Args:
        wrapper: its table.
        config: the config.json of the model that the text model came from.
        before: config.json of its text model alone.
        after: that of the new text model.
        sizes: axis sizes of the new text model.
    """
    changed = {
        key: value for key, value in after.items() if key not in _OWN and before.get(key) != value
    }
    tied = after["tie_word_embeddings"]
    inner = {**config[TEXT], **changed, "tie_word_embeddings": tied}
    written = {**config, TEXT: inner, "tie_word_embeddings": tied}
    written["architectures"] = [wrapper.architecture]
    for path, axis in wrapper.config.items():
        part, key = path.split(".")
        if isinstance(written.get(part), Mapping):
            written[part] = {**written[part], key: sizes[axis]}
    return written


_OWN = {
    "architectures", "model_type", "dtype", "torch_dtype", "tie_word_embeddings",
    "transformers_version", "quantization_config", *(key for key in _SHARED if key.endswith("_id")),
}  # fmt: skip
"""Keys that the whole model's config.json keeps as they are, or that are written apart."""
