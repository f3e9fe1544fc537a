"""What a checkpoint holds around its causal LM: the other parts of a multimodal model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.hf_config import QUANTISATION
from nemo_minitron.checkpoints.tensor_rows import Entry
from nemo_minitron.families import Wrapper, wrapper_of
from nemo_minitron.security.plain_text import plain


@dataclass(frozen=True)
class Surroundings:
    """The other parts of a multimodal model.

    Attributes:
        wrapper: the table that says where the causal LM lies.
        config: the whole model's config.json, apart from what it says of quantised weights.
        entries: the other parts' tensors, by their names on disk.
        stored: names on disk of the causal LM's tensors.
    """

    wrapper: Wrapper
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    stored: tuple[str, ...]


def apart(
    folder: Path, whole: Mapping[str, Any], entries: Mapping[str, Entry]
) -> tuple[Surroundings | None, dict[str, Entry]]:
    """A multimodal model's other parts, and its causal LM's tensors under the names they have alone.

    Args:
        folder: the checkpoint.
        whole: its config.json as it is.
        entries: all of its tensors, by their names on disk.

    Raises:
        ValueError: two tensors would have one name.
    """
    wrapper = wrapper_of(whole)
    if wrapper is None:
        return None, dict(entries)
    inside: dict[str, str] = {}
    others: dict[str, Entry] = {}
    for stored, entry in entries.items():
        name = wrapper.text_name(stored)
        if name is None:
            others[stored] = entry
        elif name in inside:
            raise ValueError(
                f"{folder}: {plain(stored, 120)} and {plain(inside[name], 120)} are one tensor of the text "
                "model"
            )
        else:
            inside[name] = stored
    config = {key: value for key, value in whole.items() if key not in QUANTISATION}
    around = Surroundings(wrapper, config, others, tuple(inside.values()))
    return around, {name: entries[stored] for name, stored in inside.items()}
