"""Cached logits of a teacher: parts in safetensors, a row per sample, a few entries per token."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nemo_minitron.losses.sparse_targets import SparseTargets
from nemo_minitron.workspace.artifacts import check_file
from nemo_minitron.workspace.atomic import replacing
from nemo_minitron.workspace.typed_json import read_json, remedy

FILE = "logits.json"
PART_BYTES = 256 * 2**20


def part_name(number: int) -> str:
    """File of a part."""
    return f"part-{number:05}.safetensors"


def token_bytes(method: str, entries: int, vocabulary: int) -> int:
    """Bytes of one token: ids in two bytes where they suffice; log-probabilities and tail in float16."""
    ids = entries * (2 if vocabulary <= 2**16 else 4)
    return ids + 2 * (entries + 1) if method == "top_k" else ids


def write_part(
    folder: Path, number: int, targets: SparseTargets, rows: int, vocabulary: int
) -> None:
    """Writes the rows of one part, whole or not at all.

    Args:
        folder: where parts lie.
        number: which.
        targets: those of rows x positions tokens, row by row.
        rows: how many.
        vocabulary: entries of the vocabulary: decides the width of an id.
    """
    narrow = torch.uint16 if vocabulary <= 2**16 else torch.int32
    tensors = {"ids": targets.ids_TK.to(narrow).unflatten(0, (rows, -1)).contiguous()}
    if targets.log_p_TK is not None:
        assert targets.log_tail_T is not None
        masses = torch.cat([targets.log_p_TK, targets.log_tail_T[:, None]], -1)
        tensors["log_p"] = masses.half().unflatten(0, (rows, -1)).contiguous()
    if targets.mass_T is not None:
        tensors["mass"] = targets.mass_T.half().unflatten(0, (rows, -1)).contiguous()
    with replacing(folder / part_name(number)) as temporary:
        save_file(tensors, temporary)


class _Facts(TypedDict):
    method: str
    entries: int
    temperature: float
    rows: int
    rows_per_part: int
    validation: int
    samples: str
    vocabulary: int
    tokens: int
    bytes_per_token: int
    mass: float
    outside: NotRequired[str]


class TeacherLogits:
    """Reads an artifact of cached logits.

    Attributes:
        facts: ``method``, ``entries``, ``temperature``, ``rows`` (of training samples),
            ``rows_per_part``, ``validation`` (the row of the first validation sample), ``samples``
            (fingerprint of the training samples), ``vocabulary`` (entries that count), ``outside`` (of a
            student whose vocabulary was cut: ``distill.outside``).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_file(folder / FILE)
        self.facts: Mapping[str, Any] = read_json(folder / FILE, _Facts)
        self._part = functools.lru_cache(maxsize=64)(self._open)

    def __getitem__(self, rows: Sequence[int]) -> SparseTargets:
        """Targets of some rows, tokens of one after those of the other."""
        ids, log_p, mass = [], [], []
        for row in rows:
            number, place = divmod(row, self.facts["rows_per_part"])
            part = self._part(number)
            ids.append(part.get_slice("ids")[place].long())
            if self.facts["method"] == "top_k":
                log_p.append(part.get_slice("log_p")[place].float())
            if self.facts.get("outside") == "tail":
                mass.append(part.get_slice("mass")[place].float())
        mass_T = torch.cat(mass) if mass else None
        if not log_p:
            return SparseTargets(torch.cat(ids), mass_T=mass_T)
        masses = torch.log_softmax(
            torch.cat(log_p), -1
        )  # what float16 has rounded sums to one again
        return SparseTargets(torch.cat(ids), masses[:, :-1], masses[:, -1], mass_T)

    def _open(self, number: int) -> Any:
        path = self.folder / part_name(number)
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged: {error}; {remedy(path)}") from None
