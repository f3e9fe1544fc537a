"""What a batch job makes: whether a job that an earlier flow left is the one that is wanted now."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.stages.run import COMPUTING, SEVERAL
from nemo_minitron.training.trainer_arguments import merged
from nemo_minitron.workspace.manifest import digest

BASELINE = "baseline"
"""Name of the training from scratch among a run's stages; it runs as ``pretrain`` does."""

_HOW = (
    "launch", "track", "export", "batch_size", "accumulate_grad_batches", "val_check_interval",
    "limit_val_batches", "validate_every", "baseline",
)  # fmt: skip
"""Keys of the configuration that say how stages work; what of them decides what comes of it is added."""


def recipe_of(values: Mapping[str, Any]) -> str:
    """Identifies what stages make of a configuration, however they are started and in what micro-batches.

    Args:
        values: the whole configuration as plain dictionaries, before a micro-batch was halved for
            want of memory: halving one stage's changes ``trainer``, which others share.
    """

    def core(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: core(each) for name, each in value.items() if name not in _HOW}

    trained = [name for name in ("pretrain", "correct") if values[name]["enabled"]]
    trainings = {name: _training(values, name) for name in (*trained, "distill")}
    # evaluate measures in the dtype that goes out
    return digest([core(values), trainings, values["export"]["dtype"]])


def _training(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a training's micro-batches and their rhythm decide, as its artifact's fingerprint has it."""
    section, launch = values[name], values["launch"]
    trainer = merged(values["trainer"], section.get("trainer") or {})
    accumulate = trainer.get("accumulate_grad_batches") or 1
    ranks = 1
    if launch["kind"] in ("torchrun", "slurm") and is_shared(name, launch["stages"]):
        nodes = launch["slurm"]["nodes"] if launch["kind"] == "slurm" else 1
        together = processes_of_node(launch["processes"]) * nodes
        ranks = max(1, together // values["training"]["tensor_parallel"])
    decides = {"samples_a_step": section["batch_size"] * accumulate * ranks}
    if values["training"]["keep"] == "last":
        return decides
    every = values["training"]["validate_every"] or trainer.get("val_check_interval")
    if isinstance(every, int) and not values["training"]["validate_every"]:
        every = every / accumulate
    return {**decides, "every": every, "limit_val_batches": trainer.get("limit_val_batches")}


def is_shared(name: str, chosen: Sequence[str] | None) -> bool:
    """Whether several processes share a stage; see ``is_sent``."""
    return (name in SEVERAL or name == BASELINE) and is_sent(name, chosen)


def is_sent(name: str, chosen: Sequence[str] | None) -> bool:
    """Whether torchrun and slurm apply to a stage; the baseline's as the student's, whose tokens it sees.

    Args:
        name: the stage, or ``BASELINE``.
        chosen: ``launch.stages``.
    """
    if chosen is None:
        return name in COMPUTING or name == BASELINE
    return name in chosen or (name == BASELINE and "distill" in chosen)


def processes_of_node(asked: int | None) -> int:
    """Processes per node: ``launch.processes``, or one per GPU of this machine."""
    if asked:
        return asked
    import torch

    return max(1, torch.cuda.device_count())
