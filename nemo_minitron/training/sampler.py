"""Batches in an order that depends on the seed and on how much was consumed, nothing else.

Because of that a resumed run needs no state of the loader: the step in the checkpoint says which
batch is next.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from nemo_minitron.data.documents import find_text
from nemo_minitron.data.windows import pack
from nemo_minitron.models.causal_lm import load_tokenizer


class ConsumedSampler(Sampler[list[int]]):
    """Indices of each batch of this rank, from the first batch that has not been consumed.

    Every pass over the samples is a permutation of its own.

    Attributes:
        samples: samples in the data set.
        batch_size: samples per batch and rank.
        batches: batches of the whole training, for ``len``: also those consumed before.
        consumed: gives the batches that have been consumed, asked when iteration begins.
        rank, world: this rank's place among the data-parallel ranks.
        seed: seed of the permutations.
        skipped: batches of that order which are left out; those behind them move up.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        batches: int,
        consumed: Callable[[], int],
        rank: int,
        world: int,
        seed: int,
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self.samples, self.batch_size, self.batches = samples, batch_size, batches
        self.consumed, self.rank, self.world, self.seed = consumed, rank, world, seed
        self.skipped = skipped

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        order, known = [], -1
        for batch in kept_batches(self.consumed(), self.batches, self.skipped):
            first = (batch * self.world + self.rank) * self.batch_size
            indices = []
            for position in range(first, first + self.batch_size):
                turn, place = divmod(position, self.samples)
                if turn != known:
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
                    order, known = torch.randperm(self.samples, generator=generator).tolist(), turn
                indices.append(order[place])
            yield indices


def kept_batches(start: int, stop: int, skipped: frozenset[int]) -> Iterator[int]:
    """Numbers of the batches ``start`` to ``stop`` of a training that leaves ``skipped`` ones out."""
    kept = (batch for batch in itertools.count() if batch not in skipped)
    return itertools.islice(kept, start, stop)


class PackedSamples(torch.utils.data.Dataset[Tensor]):
    """Samples of shape [positions + 1] in memory; the last token of each is only a label.

    A negative entry ~id is a token that is read, and not learned.
    """

    def __init__(self, tokens_NS: Tensor) -> None:
        self.tokens_NS, self.positions = tokens_NS, tokens_NS.shape[1] - 1

    def __len__(self) -> int:
        return self.tokens_NS.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens_NS[index]


def as_samples(given: Any) -> Any:
    """A data set of packed samples: as it is, or made of a Tensor of shape [samples, positions + 1]."""
    return PackedSamples(given) if isinstance(given, Tensor) else given


def train_loader(samples: Any, sampler: ConsumedSampler) -> DataLoader[Tensor]:
    """Loader of training batches, Tensor of shape [batch, positions + 1]."""
    return DataLoader(samples, batch_sampler=sampler)


def validation_loader(samples: Any, batch_size: int) -> DataLoader[Tensor]:
    """Loader of validation batches in order, Tensor of shape [batch, positions + 1]."""
    return DataLoader(samples, batch_size=batch_size)


class Numbered(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Packed samples, each with its number, which begins at ``first``."""

    def __init__(self, given: Any, first: int = 0) -> None:
        self.samples, self.first = as_samples(given), first
        self.positions = self.samples.positions

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples[index], self.first + index


def packed_tokens(cfg: DictConfig, where: str) -> Tensor:
    """The samples of a ``train_ds`` or ``validation_ds``, Tensor of shape [samples, positions + 1]."""
    paths = [cfg.paths] if isinstance(cfg.paths, str) else list(cfg.paths)
    texts = find_text(paths, list(cfg.exclude), cfg.format, cfg.text_key, where)
    own = load_tokenizer(Path(cfg.tokenizer))
    return pack(texts, own, cfg.sequence_length, cfg.samples, cfg.seed).samples
