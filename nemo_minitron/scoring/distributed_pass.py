"""Scoring passes on one process or on torchrun's ranks: rank 0 sends requests, the others perform them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.calibration_samples import Samples
from nemo_minitron.families import Family
from nemo_minitron.models.causal_lm import decoder_of, layers_of, load_model, pick_device
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.scoring.batch_size import fitting
from nemo_minitron.scoring.calibration_sums import CalibrationSums, merge_sums
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.layerwise_checkpoint import LayerwiseCheckpoint
from nemo_minitron.scoring.pass_by_layer import streamed
from nemo_minitron.scoring.pass_in_memory import in_memory
from nemo_minitron.scoring.scores_file import Scores, read_scores, write_scores
from nemo_minitron.workspace.atomic import clear, replaced_in, replacing_folder, standing
from nemo_minitron.workspace.manifest import digest


@dataclass(frozen=True)
class PassRequest:
    """Request for one pass, sent by rank 0.

    Attributes:
        folder: the model.
        samples: the calibration samples.
        groups: for every rank, the numbers of the samples of each of its batches.
        measures: what to sum.
        removed: layers that are left out all along.
        device: as ``score.device``.
        streaming: whether one layer is in memory at a time.
        sharded: whether the model is sharded over the ranks.
        budget: bytes of hidden states that streaming keeps in memory.
        state: folder for sums so far, and for what streaming spills.
        save_seconds: how often they are saved; None: not at all.
    """

    folder: Path
    samples: Samples
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    measures: Measures
    removed: frozenset[int]
    device: str
    streaming: bool
    sharded: bool
    budget: int
    state: Path
    save_seconds: float | None


@contextmanager
def leading(ranks: Ranks) -> Iterator["Leader"]:
    """Rank 0's part; the end of the block ends the other ranks' part.

    An error does not: the others may be in the midst of a pass, and wait for another message. It ends
    this rank, and torchrun ends them.
    """
    yield Leader(ranks)
    ranks.broadcast(None)


def follow(ranks: Ranks) -> None:
    """The other ranks' part: performs rank 0's requests until there are no more."""
    models = _Models(ranks)
    while (job := ranks.broadcast(None)) is not None:
        ranks.gather(_perform(job, ranks, models, lambda _: None))


class Leader:
    """Runs passes; keeps the model in memory between them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._models = _Models(ranks)

    def run(
        self, job: PassRequest, progress: Callable[[int], None] = lambda _: None
    ) -> CalibrationSums:
        """Sums over all ranks.

        Args:
            job: the pass.
            progress: called with tokens that this rank has read.
        """
        self.ranks.broadcast(job)
        found: list[CalibrationSums] = self.ranks.gather(
            _perform(job, self.ranks, self._models, progress)
        )
        return reduce(merge_sums, found)

    def model(self, folder: Path, device: str) -> Any:
        """A model in memory, for other uses than a pass."""
        return self._models.get(folder, device, False)

    def fitting(
        self,
        folder: Path,
        device: str,
        samples: Samples,
        indices: Sequence[int],
        measures: Measures,
    ) -> tuple[int, str]:
        """How many samples a GPU reads at once, tried on this rank's; and a line that says so."""
        share = indices[:: self.ranks.size]
        return fitting(
            self.model(folder, device), open_checkpoint(folder), samples, share, measures
        )


class _Models:
    """The model that was used last."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._key: tuple[Path, str, bool] | None = None
        self._model: Any = None

    def get(self, folder: Path, device: str, sharded: bool) -> Any:
        """The model of a folder, loaded (and sharded over the ranks) unless it is the last one."""
        if self._key != (folder, device, sharded):
            self._model = None  # the old one goes before the new one comes
            place = _device(device, self._ranks)
            self._model = load_model(folder, device=place)
            if sharded and self._ranks.several:
                _shard(self._model, open_checkpoint(folder).family)
            self._key = (folder, device, sharded)
        return self._model


def _device(name: str, ranks: Ranks) -> torch.device:
    device = pick_device(name)
    if ranks.several and device.type == "cuda":
        return torch.device("cuda", ranks.local)
    return device


def _shard(model: Any, family: Family) -> None:
    """FSDP2: each layer's weights are gathered for its own forward pass only; the head stays whole."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers_of(model, family):
        fully_shard(layer)
    fully_shard(decoder_of(model, family))


def split_batches(
    indices: Sequence[int], batch_size: int, ranks: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Batches of samples, dealt to the ranks in turn."""
    batches = [tuple(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    return tuple(tuple(batches[rank::ranks]) for rank in range(ranks))


def _perform(
    job: PassRequest, ranks: Ranks, models: _Models, progress: Callable[[int], None]
) -> CalibrationSums:
    groups = job.groups[ranks.rank]
    checkpoint = open_checkpoint(job.folder)
    if job.streaming and not groups:
        return CalibrationSums()
    if job.streaming:
        device = _device(job.device, ranks)
        recipe = digest([checkpoint.fingerprint, groups, asdict(job.measures), sorted(job.removed)])
        savings = LayerwiseCheckpoint(job.state / f"layers-{ranks.rank}", recipe, job.save_seconds)
        calibration = streamed(
            checkpoint, job.samples, groups, job.measures, device, job.budget, job.state, job.removed,
            progress, savings,
        )  # fmt: skip
        savings.clear()
        return calibration
    idle = max(map(len, job.groups)) - len(groups) if job.sharded else 0
    saved = time.monotonic()

    def report(sums: Callable[[], CalibrationSums], tokens: int) -> None:
        nonlocal saved
        progress(tokens)
        if job.save_seconds is not None and time.monotonic() - saved >= job.save_seconds:
            _save(job.state / f"part-{ranks.rank}", sums())
            saved = time.monotonic()

    model = models.get(job.folder, job.device, job.sharded)
    return in_memory(
        model, checkpoint, job.samples, groups, job.measures, job.removed, idle, report
    )


def _save(target: Path, calibration: CalibrationSums) -> None:
    """Writes sums so that a reader finds the old ones or the new ones, whole."""
    with replacing_folder(target) as fresh:
        write_scores(fresh, Scores({}, calibration))


def load_partial(state: Path) -> CalibrationSums:
    """The sums that a killed run left, those of all its ranks together.

    A sample that lies in several files (an older one that was not cleared away in time) counts
    once.
    """
    places = [standing(path) for path in replaced_in(state, "part-*") if path.suffix != ".new"]
    parts = [read_scores(path).calibration for path in places if path is not None]
    found = CalibrationSums()
    for part in sorted(parts, key=lambda part: -len(part.samples)):
        if not set(part.samples) & set(found.samples):
            found = merge_sums(found, part)
    return found


def save_partial(state: Path, calibration: CalibrationSums) -> None:
    """Saves the sums of an earlier run in one file, in the place of its parts."""
    _save(state / "part-all", calibration)
    for path in replaced_in(state, "part-*"):
        if path.name != "part-all":
            clear(path)
