"""One training, through NeMo.

Lightning's Trainer, exp_manager for checkpoints and loggers, resumable at any time.
"""

import inspect
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nemo.utils import logging as nemo_logging
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf
from torch import Tensor

from nemo_minitron.artifacts import log
from nemo_minitron.plugin.callbacks import ExactResume, LossGuard, TrainingLog
from nemo_minitron.plugin.model import MinitronModel, make_cfg
from nemo_minitron.plugin.preemption import Preemption

_STEP = re.compile(r"step=(\d+)")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        trainer: arguments of Lightning's Trainer.
        optim: NeMo optimiser and scheduler.
        exp_manager: NeMo's exp_manager; its folders are set here.
        batch_size: samples per micro-batch and device.
        seed: seed of the sample order.
    """

    trainer: Mapping[str, Any]
    optim: Mapping[str, Any]
    exp_manager: Mapping[str, Any]
    batch_size: int
    seed: int


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuses what Lightning's Trainer would not take.

    Raises:
        ValueError: an unknown key, no positive ``max_steps``, or devices for which nobody started processes.
    """
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    unknown = sorted(set(trainer) - known)
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], known, 3)
        raise ValueError(
            f"trainer.{unknown[0]}: Lightning's Trainer has no such argument; nearest: {', '.join(near)}"
        )
    steps = trainer["max_steps"] if "max_steps" in trainer else None
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"trainer.max_steps: expected a positive whole number, found {steps!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return  # torchrun has started a process for every device
    for key in ("devices", "num_nodes"):
        if trainer.get(key) not in (None, 1, "1", [0]):
            raise ValueError(
                f"trainer.{key}: a process trains on one device, found {trainer[key]!r}; start several with "
                "torchrun --nproc-per-node N -m nemo_minitron"
            )


def train(
    hf_model: Any,
    hf_config: dict[str, Any],
    files: Path | None,
    recipe: Recipe,
    train_NS: Tensor,
    validation_NS: Tensor,
    state: Path,
    callbacks: Sequence[Callback] = (),
) -> MinitronModel:
    """Trains a model, going on from the newest checkpoint in ``state`` if there is one.

    Args:
        hf_model: a Hugging Face causal LM in the dtype to train in.
        hf_config: its config.json.
        files: folder with its tokenizer, or None.
        recipe: how.
        train_NS: packed samples, Tensor of shape [samples, positions + 1].
        validation_NS: the same for validation.
        state: folder for checkpoints and the log ``metrics.jsonl``.
        callbacks: what makes the role (distillation) and what the caller wants to see.

    Returns:
        The trained model.
    """
    _quiet()
    check_trainer(recipe.trainer)
    try:
        trainer = _trainer(recipe, train_NS.shape[1] - 1, state, callbacks)
        model = MinitronModel(make_cfg(hf_config, files, dict(recipe.optim)), trainer, hf_model.train())
        model.use_training_samples(train_NS, recipe.batch_size, recipe.seed)
        model.use_validation_samples(validation_NS, recipe.batch_size)
        _manage(trainer, recipe, state)
        model.setup_optimization()  # once now, so that wrong arguments show before anything runs
    except (MisconfigurationException, TypeError) as error:
        raise ValueError(f"trainer, optim, exp_manager: {str(error).splitlines()[0]}") from error
    try:
        trainer.fit(model)
        if trainer.global_step < trainer.max_steps:
            raise RuntimeError(
                f"training stopped at step {trainer.global_step} of {trainer.max_steps} (time limit, early "
                "stopping); its checkpoint stays, run it again to go on"
            )
    except MisconfigurationException as error:
        raise ValueError(f"trainer, exp_manager: {str(error).splitlines()[0]}") from error
    return model


def _trainer(recipe: Recipe, positions: int, state: Path, callbacks: Sequence[Callback]) -> Trainer:
    arguments = dict(recipe.trainer)
    every = arguments["log_every_n_steps"] if arguments.get("log_every_n_steps") else 10
    accumulate = arguments["accumulate_grad_batches"] if "accumulate_grad_batches" in arguments else 1
    bar = [TQDMProgressBar(refresh_rate=10)] if arguments.get("enable_progress_bar", True) else []
    # logger, checkpoints and their folders are exp_manager's; the sampler knows its ranks itself
    fixed = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    trainer = Trainer(**{**arguments, **fixed}, callbacks=[*callbacks, ExactResume(), LossGuard(), *bar])
    tokens = recipe.batch_size * positions * accumulate * trainer.world_size
    trainer.callbacks.append(TrainingLog(state / log.FILE, every, tokens))
    trainer.callbacks.append(Preemption(state / "nemo" / "checkpoints"))  # after the log: it may raise
    return trainer


def _manage(trainer: Trainer, recipe: Recipe, state: Path) -> None:
    """Hands checkpoints and loggers to NeMo's exp_manager.

    Raises:
        ValueError: exp_manager does not know a key.
    """
    folder = state / "nemo"
    newest = newest_checkpoint(folder / "checkpoints")
    settings = {
        **recipe.exp_manager,
        "explicit_log_dir": str(folder),
        "resume_from_checkpoint": None if newest is None else str(newest),
    }
    from omegaconf.errors import ConfigKeyError

    try:
        exp_manager(trainer, OmegaConf.create(settings))
    except ConfigKeyError as error:
        raise ValueError(f"exp_manager: {str(error).splitlines()[0]}") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The finished checkpoint with the highest step in its name, or None."""
    finished = [
        path for path in folder.glob("*.ckpt") if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)
    ]
    return max(
        finished,
        key=lambda path: int(match.group(1)) if (match := _STEP.search(path.name)) else -1,
        default=None,
    )


def samples_needed(trainer: Mapping[str, Any], batch_size: int) -> int:
    """Samples that a training consumes."""
    accumulate = trainer["accumulate_grad_batches"] if "accumulate_grad_batches" in trainer else 1
    devices, nodes = (trainer[key] if key in trainer else 1 for key in ("devices", "num_nodes"))
    ranks = int(devices) * int(nodes) if str(devices).isdecimal() else 1
    return int(trainer["max_steps"] * accumulate * batch_size * ranks)


def _quiet() -> None:
    """Keeps NeMo's and Lightning's chatter out of the way of the progress bar.

    Warnings of substance remain.
    """
    nemo_logging.setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (
        "does not have many workers",
        "not resumable",
        "LeafSpec",
        "isinstance(treespec",
        "lr_scheduler.step",
    ):
        warnings.filterwarnings("ignore", message=f".*{re.escape(text)}.*")
