"""Batches in an order that depends on the seed and on how much was consumed, nothing else.

Because of that a resumed run needs no state of the loader: the step in the checkpoint says which
batch is next.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from nemo_minitron.config.batch_limit import batches_of_epoch, check_limit


@dataclass(frozen=True)
class Schedule:
    """Which batches come next.

    Attributes:
        start: batches that have been consumed.
        stop: where the loader's pass ends: the whole training, or the epoch.
        length: batches that the loader says it has, also those consumed before; of these Lightning
            takes ``limit_train_batches``.
        rank, world: this rank's place among the data-parallel ranks.
        epoch_samples: samples of all ranks after which the order is redrawn; None: all there are.
        limited: batches of an epoch of Lightning's; None: ``length``.
    """

    start: int
    stop: int
    length: int
    rank: int = 0
    world: int = 1
    epoch_samples: int | None = None
    limited: int | None = None


def schedule_of(
    trainer: Any,
    samples: int,
    batch_size: int,
    tensor_parallel: int = 1,
    whole: bool = False,
    step: int | None = None,
) -> Schedule:
    """Where a training stands, by the trainer's settings.

    Without ``max_epochs`` one pass of the loader is the whole training of ``max_steps``. With it a
    pass is an epoch: all whole batches of the samples, or what ``limit_train_batches`` leaves of them.

    Args:
        trainer: Lightning's Trainer, or None before there is one.
        samples: samples in the data set.
        batch_size: samples per batch and rank.
        tensor_parallel: ranks that read the same samples, where the trainer's strategy does not say.
        step: the step that it stands at; None: the trainer's.
        whole: whether a pass is the whole training in any case; ``ExactResume`` counts on it.

    Raises:
        ValueError: there are too few samples for one batch of all ranks; or a pass is the whole
            training, and ``limit_train_batches`` ends epochs in the midst of a step.
    """
    sharing = _sharing(trainer, tensor_parallel)
    world = 1 if trainer is None else max(1, trainer.world_size // sharing)
    rank = 0 if trainer is None else trainer.global_rank // sharing
    epoch = samples // (batch_size * world)
    if trainer is None:
        return Schedule(0, epoch, epoch)
    per_step, step = trainer.accumulate_grad_batches, trainer.global_step if step is None else step
    limit = trainer.limit_train_batches
    if (whole or trainer.max_epochs in (None, -1)) and trainer.max_steps > 0:
        length = trainer.max_steps * per_step
        check_limit("trainer.limit_train_batches", limit, per_step, length)
        limited = batches_of_epoch(limit, length)
        return Schedule(step * per_step, length, length, rank, world, limited=limited)
    length, epoch = epoch, batches_of_epoch(limit, epoch)
    if epoch < 1:
        raise ValueError(
            f"train_ds: {samples} samples are too few for a batch of {batch_size} on each of {world} ranks"
        )
    # the last step of an epoch may be of fewer micro-batches
    epochs, rest = divmod(step, -(-epoch // per_step))
    start = epochs * epoch + min(rest * per_step, epoch)
    stop, each = (epochs + 1) * epoch, epoch * batch_size * world
    return Schedule(start, stop, length, rank, world, each, epoch)


def _sharing(trainer: Any, given: int) -> int:
    """Ranks that share one model: the strategy's own mesh knows, once the ranks have met."""
    try:
        mesh = None if trainer is None else getattr(trainer.strategy, "device_mesh", None)
    except RuntimeError:  # Lightning's, of a mesh that is not there yet
        return given
    named = getattr(mesh, "mesh_dim_names", None) or ()
    return int(mesh["tensor_parallel"].size()) if "tensor_parallel" in named else given


@dataclass(frozen=True)
class Place:
    """Where the samples of a batch lie.

    Attributes:
        number: of the batch among those that read the same samples.
        first: the first of these in the data set.
        samples: how many there are.
    """

    number: int
    first: int
    samples: int


class ConsumedSampler(DistributedSampler[list[int]]):
    """Indices of each batch of this rank, from the first batch that has not been consumed.

    Every pass over the samples is a permutation of its own. It splits the samples over ranks by
    itself; Lightning leaves alone what is a ``DistributedSampler``.

    Attributes:
        samples: samples in the data set.
        micro_batch_size: samples per batch and rank; NeMo's schedulers ask for it.
        schedule: gives what comes next, or came after a step that it is called with; asked when
            iteration begins.
        order_seed: seed of the permutations; None: the samples come in their own order.
        skipped: batches of that order which are left out; those behind them move up.
        place: where the samples of a batch lie; None: in the whole data set.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        schedule: Callable[..., Schedule],
        seed: int | None,
        skipped: frozenset[int] = frozenset(),
        place: Callable[[int], Place] | None = None,
    ) -> None:
        self.samples, self.micro_batch_size, self.schedule = samples, batch_size, schedule
        self.order_seed, self.skipped, self.place = seed, skipped, place

    def __len__(self) -> int:
        return self.schedule().length

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the order follows from what was consumed."""

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        at = self.schedule()
        order: list[int] = []
        known: tuple[int, int] | None = None
        for batch in kept_batches(at.start, at.stop, self.skipped):
            place = Place(batch, 0, self.samples) if self.place is None else self.place(batch)
            each = at.epoch_samples or place.samples
            first = (place.number * at.world + at.rank) * self.micro_batch_size
            indices = []
            for position in range(first, first + self.micro_batch_size):
                epoch, number = divmod(position, each)
                if (epoch, place.first) != known:
                    order, known = self._order(epoch, place.samples), (epoch, place.first)
                indices.append(place.first + order[number])
            yield indices

    def _order(self, epoch: int, samples: int) -> list[int]:
        if self.order_seed is None:
            return list(range(samples))
        generator = torch.Generator().manual_seed(self.order_seed * 1_000_003 + epoch)
        return torch.randperm(samples, generator=generator).tolist()


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


def train_loader(samples: Any, sampler: ConsumedSampler, **how: Any) -> DataLoader[Tensor]:
    """Loader of training batches, Tensor of shape [batch, positions + 1]; ``how``: its further arguments."""
    loader = DataLoader(samples, batch_sampler=sampler, **how)
    # a loader forbids the assignment; Lightning asks here whether the samples are split over ranks
    loader.__dict__["sampler"] = sampler
    return loader


def validation_loader(samples: Any, batch_size: int, **how: Any) -> DataLoader[Tensor]:
    """Loader of validation batches in order, Tensor of shape [batch, positions + 1]."""
    return DataLoader(samples, batch_size=batch_size, **how)


class Numbered(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Packed samples, each with its number, which begins at ``first``."""

    def __init__(self, given: Any, first: int = 0) -> None:
        self.samples, self.first = as_samples(given), first
        self.positions = self.samples.positions

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples[index], self.first + index
