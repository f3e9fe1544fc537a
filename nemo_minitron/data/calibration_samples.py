"""Samples for scoring: windows of the text, and the batches that a model reads."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.data.documents import TextSet, documents, no_text
from nemo_minitron.data.tokenisation import begin_tokens, tokenised
from nemo_minitron.data.windows import Window, beginnings, mixed, windows

POOL = 8192
"""Samples among which the next is drawn; a constant, so that more samples begin with those that fewer are."""
PACKING = ("plain", "documents", "off")


@dataclass(frozen=True)
class Samples:
    """Calibration samples, each one token longer than what a model reads: the labels are shifted by one.

    Attributes:
        tokens_NS: token ids, int64.
        valid_NS: where a token is no padding; None: nowhere.
        positions_NS: position of each token in its own document; None: that in the sample.
        text_N: number of the text in the mixture that each sample is of, int64; None: all of one.
    """

    tokens_NS: Tensor
    valid_NS: Tensor | None = None
    positions_NS: Tensor | None = None
    text_N: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.tokens_NS)

    def fingerprints(self) -> list[str]:
        """The first 16 hexadecimal digits of the SHA-256 of every sample's ids and document boundaries."""
        result = []
        for i, row_S in enumerate(self.tokens_NS):
            row_S = row_S if self.valid_NS is None else row_S[self.valid_NS[i]]
            digester = hashlib.sha256(row_S.numpy().astype("<i4").tobytes())
            if self.positions_NS is not None:
                digester.update((self.positions_NS[i] == 0).numpy().tobytes())
            result.append(digester.hexdigest()[:16])
        return result

    def batches(
        self, groups: Sequence[Sequence[int]], device: torch.device
    ) -> Iterator[tuple[Sequence[int], "Batch"]]:
        """Batches of groups of samples, and the groups, where a device takes them from."""
        for group in groups:
            made = self.batch(group)
            yield group, made.pinned() if device.type == "cuda" else made

    def batch(self, indices: Sequence[int]) -> "Batch":
        """A batch of samples, in the form that a model reads."""
        chosen = list(indices)
        tokens_BS = self.tokens_NS[chosen]
        labels_BS = tokens_BS[:, 1:].clone()
        mask_BS = positions_BS = None
        if self.valid_NS is not None:
            labels_BS[~self.valid_NS[chosen][:, 1:]] = -1
            mask_BS = self.valid_NS[chosen][:, :-1]
        if self.positions_NS is not None:
            labels_BS[
                self.positions_NS[chosen][:, 1:] == 0
            ] = -1  # a document does not predict the next
            positions_BS = self.positions_NS[chosen][:, :-1]
        text_B = None if self.text_N is None else self.text_N[chosen]
        return Batch(tokens_BS[:, :-1], labels_BS, mask_BS, positions_BS, text_B)


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass.

    Attributes:
        tokens_BS: token ids.
        labels_BS: ids of the tokens that follow, -1 where none counts.
        mask_BS: where a token is no padding; None: everywhere.
        positions_BS: position ids where documents share a sample: where they start over,
            transformers keeps attention inside the document; None: one after the other.
        text_B: number of each sample's text; None: all of one.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    mask_BS: Tensor | None = None
    positions_BS: Tensor | None = None
    text_B: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; a GPU is not waited for."""
        return self._each(lambda part: part.to(device, non_blocking=device.type == "cuda"))

    def pinned(self) -> "Batch":
        """The same in memory that a GPU copies from while it computes."""
        return self._each(Tensor.pin_memory)

    def part(self, start: int, stop: int) -> "Batch":
        """Some of its samples."""
        return self._each(lambda part: part[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        mask_BS, positions_BS, text_B = (
            None if part is None else change(part)
            for part in (self.mask_BS, self.positions_BS, self.text_B)
        )
        return Batch(change(self.tokens_BS), change(self.labels_BS), mask_BS, positions_BS, text_B)

    def inputs(self) -> dict[str, Any]:
        """Arguments of a decoder's forward pass."""
        given: dict[str, Any] = {"input_ids": self.tokens_BS, "use_cache": False}
        if self.mask_BS is not None:
            given["attention_mask"] = self.mask_BS.long()
        if self.positions_BS is not None:
            given["position_ids"] = self.positions_BS
        return given

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``models.hidden_states``."""
        given = self.inputs()
        return {"tokens_BS": given.pop("input_ids"), **given}


def calibration_samples(
    mixture: Sequence[tuple[TextSet, float]],
    tokenizer: Any,
    length: int,
    samples: int | None,
    seed: int,
    packing: str = "plain",
    where: str = "data.calibration",
) -> Samples:
    """Samples for scoring. A larger number of samples begins with those of a smaller number.

    ``plain``: documents end to end, as the papers pack. ``documents``: so too, but attention and
    positions start over with each document. ``off``: one document per sample, cut or padded to the
    length.

    Args:
        mixture: text sets and their weights, shares of the samples.
        tokenizer: a Hugging Face tokenizer.
        length: positions per sample.
        samples: how many; None: all of a single text set.
        seed: order of the files.
        packing: one of ``PACKING``.
        where: configuration section, for messages.

    Raises:
        ValueError: too little text.
    """
    cut, begin = beginnings if packing == "off" else windows, begin_tokens(tokenizer)
    read = [tokenised(documents(texts, seed), tokenizer, texts.where) for texts, _ in mixture]
    streams = [_spread(cut(stream, length, begin), seed) for stream in read]
    weights = [weight for _, weight in mixture]
    drawn = list(itertools.islice(mixed(streams, weights), samples))
    found = [window for _, window in drawn]
    texts = mixture[0][0]
    if not found and next(documents(texts), None) is None:
        raise ValueError(no_text(texts))
    if samples is not None and len(found) < samples:
        raise ValueError(
            f"{where}.samples: expected {samples} samples of {length} tokens, the text yields {len(found)}"
        )
    if not found:
        raise ValueError(f"{texts.where}: the text does not fill one sample of {length} tokens")
    made = _padded(found, length + 1, packing)
    if len(mixture) == 1:
        return made
    return replace(made, text_N=torch.tensor([text for text, _ in drawn]))


def _padded(found: Sequence[Window], width: int, packing: str) -> Samples:
    shape = (len(found), width)
    tokens_NS = torch.zeros(shape, dtype=torch.int64)
    positions_NS = torch.zeros(shape, dtype=torch.int64)
    valid_NS = torch.zeros(shape, dtype=torch.bool)
    for i, window in enumerate(found):
        count = len(window.ids)
        tokens_NS[i, :count] = torch.from_numpy(window.ids)
        positions_NS[i, :count] = torch.from_numpy(window.positions)
        valid_NS[i, :count] = True
    return Samples(
        tokens_NS,
        valid_NS if packing == "off" else None,
        positions_NS if packing == "documents" else None,
    )


def _spread(found: Iterator[Window], seed: int) -> Iterator[Window]:
    """Windows in an order drawn by ``seed``, one pool after the other.

    Taken as they come, a thousand samples would be a handful of long documents.
    """
    draw = random.Random(seed)
    while pool := list(itertools.islice(found, POOL)):
        draw.shuffle(pool)
        yield from pool
