"""What a training step may be given: packed samples, or a batch as transformers collates it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""transformers' label of a token that is not learned; any negative label is none here."""


@dataclass(frozen=True)
class Batch:
    """What a step reads and learns.

    Attributes:
        tokens_BS: token ids that are read.
        labels_BS: the next token of each; negative where it is not learned.
        rows_B: numbers of the samples, where they have some.
        more: further arguments of the decoder, such as ``attention_mask``.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    rows_B: Tensor | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)


def as_batch(given: Any) -> Batch:
    """A batch in the shape that the objective takes.

    Args:
        given: packed samples, Tensor of shape [batch, positions + 1], where a negative entry ~id is
            read and not learned; a pair of them and their numbers; or a mapping as transformers'
            collators make it: ``input_ids`` and, where there are some, ``attention_mask``,
            ``position_ids`` and ``labels`` (with -100 where nothing is learned; without them what
            the mask lets be read is learned), each [batch, positions]. A ``Batch`` stays what it is.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(given, Batch):
        return given
    if isinstance(given, Tensor):
        return _packed(given)
    if isinstance(given, Mapping) and isinstance(given.get("input_ids"), Tensor):
        return _of_transformers(given)
    if isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], Tensor):
        return _packed(given[0], given[1])
    found = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
    raise ValueError(
        "batch: expected token ids of shape [batch, positions + 1], or a mapping with input_ids, labels "
        f"and attention_mask of shape [batch, positions], found {found}"
    )


def _packed(samples_BS: Tensor, rows_B: Tensor | None = None) -> Batch:
    tokens_BS = torch.where(samples_BS < 0, ~samples_BS, samples_BS)
    return Batch(tokens_BS[:, :-1], samples_BS[:, 1:], rows_B)


def _of_transformers(given: Mapping[str, Any]) -> Batch:
    ids_BS, mask_BS = given["input_ids"], given.get("attention_mask")
    labels_BS = given.get("labels")
    labels_BS = ids_BS if labels_BS is None else labels_BS
    if mask_BS is not None:
        labels_BS = labels_BS.masked_fill(mask_BS == 0, IGNORED)
    named = ("attention_mask", "position_ids")
    more = {name: given[name][:, :-1] for name in named if given.get(name) is not None}
    return Batch(ids_BS[:, :-1], labels_BS[:, 1:], None, more)
