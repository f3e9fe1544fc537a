"""Runs scoring passes as configured: in memory or layer by layer, with a progress bar."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.config import Config
from nemo_minitron.scoring.calibration_sums import CalibrationSums
from nemo_minitron.workspace.progress_bar import bar

if TYPE_CHECKING:
    from nemo_minitron.data.calibration_samples import Samples
    from nemo_minitron.scoring.distributed_pass import Leader, PassRequest
    from nemo_minitron.scoring.hooks import Measures


class Runner:
    """Runs passes with the settings of one configuration, and counts tokens and seconds."""

    def __init__(
        self, config: Config, lead: "Leader", samples: "Samples", state: Path, notes: list[str]
    ) -> None:
        self.config, self.lead, self.samples, self.state, self.notes = (
            config,
            lead,
            samples,
            state,
            notes,
        )
        self.tokens, self.seconds = 0, 0.0

    def __call__(
        self,
        folder: Path,
        measures: "Measures",
        indices: Sequence[int],
        removed: frozenset[int] = frozenset(),
        save: bool = True,
    ) -> CalibrationSums:
        """Sums over some samples."""
        from nemo_minitron.scoring.distributed_pass import PassRequest, split_batches

        score = self.config.score
        streaming, note = self._choose(folder, measures)
        self._tell(note)
        size = self._samples(folder, measures, indices, streaming)
        job = PassRequest(
            folder,
            self.samples,
            split_batches(indices, size, self.lead.ranks.size),
            measures,
            removed,
            score.device,
            streaming,
            score.parallel == "shard",
            score.activation_budget,
            self.state,
            score.save_seconds if save else None,
        )
        tokens = len(indices) * (self.samples.tokens_NS.shape[1] - 1)
        started = time.monotonic()
        with bar("scoring", _tokens(job, folder)) as advance:
            calibration = self.lead.run(job, advance)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + time.monotonic() - started
        return calibration

    def _tell(self, note: str) -> None:
        if note and note not in self.notes:
            self.notes.append(note)
            print(note, flush=True)

    def _samples(
        self, folder: Path, measures: "Measures", indices: Sequence[int], streaming: bool
    ) -> int:
        """Samples of each forward pass."""
        from nemo_minitron.models.causal_lm import pick_device
        from nemo_minitron.scoring.batch_size import samples_at_once

        score = self.config.score
        tried = score.batch_size == "auto" and pick_device(score.device).type == "cuda"
        if not tried or streaming or score.parallel == "shard" or not indices:
            return samples_at_once(score.batch_size)
        size, note = self.lead.fitting(folder, score.device, self.samples, indices, measures)
        self._tell(note)
        return size

    def _choose(self, folder: Path, measures: "Measures") -> tuple[bool, str]:
        """Whether to stream, and why."""
        from nemo_minitron.models.causal_lm import pick_device
        from nemo_minitron.models.free_memory import available_bytes
        from nemo_minitron.scoring.batch_size import samples_at_once
        from nemo_minitron.scoring.pass_by_layer import layer_bytes

        score = self.config.score
        checkpoint = open_checkpoint(folder)
        if checkpoint.family.axes["layers"].fixed:  # a layer reads what others made
            if score.streaming == "on":
                raise ValueError(
                    f"score.streaming=on: no layer of {checkpoint.family.model_type} runs without the "
                    "others; use off"
                )
            return False, ""
        if score.streaming != "auto":
            return score.streaming == "on", ""
        sizes = checkpoint.architecture.sizes
        weights = sum(entry.size for entry in checkpoint.entries.values())
        width = max(entry.width for entry in checkpoint.entries.values())
        tokens = samples_at_once(score.batch_size) * self.samples.tokens_NS.shape[1]
        kept = sizes["layers"] if measures.losses or len(measures.influence) > 1 else 0
        widest = max(sizes[axis] for axis in ("ffn", "expert_ffn", "hidden") if axis in sizes)
        needed = weights + tokens * width * ((8 + kept) * sizes["hidden"] + 4 * widest)
        device = pick_device(score.device)
        # ranks share the memory of a machine, but not that of a GPU
        free = available_bytes(device) // (
            1 if device.type == "cuda" else self.lead.ranks.neighbours
        )
        if needed <= 0.8 * free or len(measures.influence) > 1 or self.config.score.depth == "task":
            return False, ""
        outside, layer = layer_bytes(checkpoint)
        return True, (
            f"score.streaming: on, for the model needs about {_gigabytes(needed)} and {_gigabytes(free)} are "
            f"free; one layer at a time needs {_gigabytes(outside + layer)} and activations"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _tokens(job: "PassRequest", folder: Path) -> int:
    """Tokens that this process reads, over all layers where layers come one by one."""
    rounds = 1
    if job.streaming:
        checkpoint = open_checkpoint(folder)
        rounds = checkpoint.architecture.sizes["layers"] - len(job.removed)
    own = sum(len(group) for group in job.groups[0])
    return own * (job.samples.tokens_NS.shape[1] - 1) * rounds
