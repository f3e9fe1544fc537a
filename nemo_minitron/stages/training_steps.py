"""How many steps a training takes, of how many samples each."""

import os
from collections.abc import Mapping
from typing import Any

from nemo_minitron.config.config import Config
from nemo_minitron.data.training_phases import PhaseText, phase_texts
from nemo_minitron.training.trainer_arguments import merged


def resolved_trainer(config: Config, changes: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """``trainer`` with torchrun's devices, and steps by ``training``, but for what the stage itself says.

    ``max_epochs`` counts passes over ``data.train.samples``: the steps end with the last of them,
    and the schedule with the steps.
    """
    trainer = {**merged(config.trainer, changes), **_launched()}
    if config.training.max_tokens is not None and changes.get("max_steps") is None:
        trainer["max_steps"] = _steps(config, trainer, batch_size)
    if (trainer.get("max_epochs") or -1) > 0 and config.data.train.samples is not None:
        read = trainer["max_epochs"] * config.data.train.samples
        steps = max(1, read // samples_a_step(config, trainer, batch_size))
        trainer["max_steps"] = min(steps, trainer["max_steps"] or steps)
    if config.training.phases:
        trainer["max_steps"] = sum(p.steps for p in phases_of(config, changes, batch_size))
    if config.training.validate_every is not None and changes.get("val_check_interval") is None:
        per_step = trainer.get("accumulate_grad_batches") or 1
        trainer["val_check_interval"] = config.training.validate_every * per_step
    return trainer


def phases_of(config: Config, changes: Mapping[str, Any], batch_size: int) -> list[PhaseText]:
    """The phases of ``training.max_tokens``, or of what ``max_steps`` of ``data.train`` would read.

    Raises:
        ValueError: see ``phase_texts``; or the training is counted in epochs, or has no number of steps.
    """
    if not config.training.phases:
        return []
    trainer = {**merged(config.trainer, changes), **_launched()}
    per_step = samples_a_step(config, trainer, batch_size)
    tokens, steps = config.training.max_tokens, trainer.get("max_steps")
    if (trainer.get("max_epochs") or -1) > 0:
        raise ValueError(
            "training.phases: are shares of tokens, and trainer.max_epochs counts passes; use "
            "training.max_tokens or trainer.max_steps"
        )
    if tokens is None or changes.get("max_steps") is not None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"trainer.max_steps: expected a positive whole number, found {steps!r}"
            )
        tokens = steps * per_step * config.data.train.sequence_length
    return phase_texts(config, tokens, per_step)


def samples_for(config: Config, trainer: Mapping[str, Any], batch_size: int) -> int:
    """Samples that a training reads: ``data.train.samples``, or as many as its steps take."""
    return config.data.train.samples or trainer["max_steps"] * samples_a_step(
        config, trainer, batch_size
    )


def samples_a_step(config: Config, trainer: Mapping[str, Any], batch_size: int) -> int:
    """Over all ranks: what decides the weights, however many ranks there are to share it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1")) // config.training.tensor_parallel
    accumulate = trainer["accumulate_grad_batches"] if "accumulate_grad_batches" in trainer else 1
    return int(batch_size * accumulate * max(1, ranks))


def _steps(config: Config, trainer: Mapping[str, Any], batch_size: int) -> int:
    """Steps that take ``training.max_tokens`` tokens, rounded up."""
    tokens = samples_a_step(config, trainer, batch_size) * config.data.train.sequence_length
    assert config.training.max_tokens is not None
    return -(-config.training.max_tokens // tokens)


def _launched() -> dict[str, Any]:
    """What torchrun's environment says of devices, for Lightning, which wants to hear it too."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return {}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    return {"devices": local, "num_nodes": size // local}
