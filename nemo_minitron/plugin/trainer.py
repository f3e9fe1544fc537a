"""One training, through NeMo.

Lightning's Trainer, exp_manager for checkpoints and loggers, resumable at any time.
"""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import summarize
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.batch_limit import KEY as LIMIT
from nemo_minitron.config.batch_limit import check_limit
from nemo_minitron.config.overrides import duration, refuse_exp_manager, refuse_trainer
from nemo_minitron.config.parallel import check_tensor_parallel
from nemo_minitron.models.trainable import described
from nemo_minitron.plugin.experiment import (
    end_loggers,
    manage,
    newest_checkpoint,
    profiler,
    step_of,
)
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.nemo_archive import make_cfg
from nemo_minitron.plugin.options import Options, check_state
from nemo_minitron.plugin.step_costs import forward_flops, step_flops, work_of_phases
from nemo_minitron.plugin.third_party_logging import silence_third_parties
from nemo_minitron.training.averaging import Averaging
from nemo_minitron.training.best_weights import BestWeights
from nemo_minitron.training.callbacks import ExactResume, TrainingLog
from nemo_minitron.training.checkpoint_safety import checkpoints_as_data
from nemo_minitron.training.compilation import is_compiled
from nemo_minitron.training.early_stopping import WatchedMetrics
from nemo_minitron.training.fit_loop import end_what_was_cut_short
from nemo_minitron.training.fp8_recipes import check_tokens
from nemo_minitron.training.loss_guard import LossGuard
from nemo_minitron.training.phases import PhasedSamples, phase_rates
from nemo_minitron.training.preemption import Preemption
from nemo_minitron.training.sampler import as_samples
from nemo_minitron.training.stop_after import KEY, StopAfter
from nemo_minitron.training.strategies import sharding_strategy
from nemo_minitron.training.transformer_engine import ReplacementLayers, transformer_engine
from nemo_minitron.workspace.layout import checkpoints_in, metrics_in
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.training_log import STOPPED

__all__ = [
    "Options",
    "TrainingSettings",
    "check_trainer",
    "forward_flops",
    "newest_checkpoint",
    "step_of",
    "train",
]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        trainer: arguments of Lightning's Trainer.
        optim: NeMo optimiser and scheduler.
        exp_manager: NeMo's exp_manager; its folders are set here.
        batch_size: samples per micro-batch and device.
        seed: seed of the sample order.
        options: the rest.
        started: when the run began, by ``time.monotonic``: what ``max_time_per_run`` counts from, also
            where a bad step has made the training begin once more.
    """

    trainer: Mapping[str, Any]
    optim: Mapping[str, Any]
    exp_manager: Mapping[str, Any]
    batch_size: int
    seed: int
    options: Options = Options()
    started: float = field(default_factory=time.monotonic)


_SWITCHES = (
    "benchmark", "detect_anomaly", "enable_model_summary", "enable_progress_bar", "inference_mode",
    "sync_batchnorm",
)  # fmt: skip


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuses what Lightning's Trainer would not take, and what a training decides itself.

    Raises:
        ValueError: an unknown key, one that would be ignored, no positive ``max_steps``, epochs that end
            in the midst of a step, or devices for which nobody started processes.
    """
    refuse_trainer(trainer)
    for key in _SWITCHES:  # a text would count as true, or end the training with an error of torch
        if trainer.get(key) is not None and not isinstance(trainer[key], bool):
            raise ValueError(f"trainer.{key}: expected true or false, found {trainer[key]!r}")
    steps = trainer["max_steps"] if "max_steps" in trainer else None
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"trainer.max_steps: expected a positive whole number, found {steps!r}")
    per_step, limit = trainer.get("accumulate_grad_batches") or 1, trainer.get(LIMIT)
    check_limit(f"trainer.{LIMIT}", limit, per_step, steps * per_step)
    _made(dict(trainer))
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
    settings: TrainingSettings,
    samples: Any,
    validation: Any,
    state: Path,
    callbacks: Sequence[Callback] = (),
    skipped: frozenset[int] = frozenset(),
) -> MinitronModel:
    """Trains a model; resumes from the newest checkpoint in ``state`` if there is one.

    Where Lightning ends it before ``max_steps`` (early stopping, ``max_time``, ``max_epochs``),
    ``stopped.json`` in ``state`` says at which step, and by what.

    Args:
        hf_model: a Hugging Face causal LM in the dtype to train in.
        hf_config: its config.json.
        files: folder with its tokenizer, or None.
        settings: how.
        samples: packed samples: a data set, or a Tensor of shape [samples, positions + 1].
        validation: the same for validation.
        state: folder for checkpoints and the log ``metrics.jsonl``.
        callbacks: what makes the role (distillation) and what the caller wants to see.
        skipped: steps whose samples are left out.

    Returns:
        The trained model.

    Raises:
        ValueError: a setting is refused; the checkpoint holds more than data, or see ``check_state``.
        BadStep: a step that must not be taken; with it in ``skipped``, another call resumes.
        Preempted, TimeOver: a signal came, ``max_time_per_run`` is over; another call resumes.
    """
    silence_third_parties()
    check_trainer(settings.trainer)
    refuse_exp_manager(settings.exp_manager)
    check_tensor_parallel(settings.options.tensor_parallel, settings.options.shard)
    check_state(state, newest_checkpoint(checkpoints_in(state)), settings.options.shard)
    try:
        trainer = _trainer(settings, [*callbacks, *phase_rates(samples, skipped)], state)
        model = MinitronModel(_cfg(hf_config, files, settings), trainer, hf_model.train())
        samples, parts = as_samples(samples), settings.options.tensor_parallel
        _watch(trainer, model, settings, samples, state)
        _apply(settings, model, trainer.strategy.root_device, samples, as_samples(validation))
        model.use_training_samples(
            samples, settings.batch_size, settings.seed, skipped, parts, whole=True
        )
        model.use_validation_samples(validation, settings.batch_size)
        manage(trainer, settings.exp_manager, state)
        model.setup_optimization()  # once now, so that wrong arguments show before anything runs
    except (MisconfigurationException, ModuleNotFoundError, TypeError) as error:
        raise ValueError(_refusal(error, settings)) from error
    if settings.trainer.get("enable_model_summary") and trainer.is_global_zero:
        print(summarize(model), file=sys.stderr)  # Lightning would log it, and its log is silent
    with checkpoints_as_data(newest_checkpoint(checkpoints_in(state))):
        _fit(trainer, model, state)
    model.gather()
    return model


def _cfg(hf_config: dict[str, Any], files: Path | None, settings: TrainingSettings) -> DictConfig:
    only = {"only": list(settings.options.only)} if settings.options.only else {}
    return make_cfg(hf_config, files, dict(settings.optim), **only)


def _check_fp8(
    layers: ReplacementLayers, settings: TrainingSettings, samples: Any, validation: Any
) -> None:
    """Refuses batches whose tokens FP8 does not take, before a step is taken."""
    if layers.fp8 is None:
        return
    rows = [min(settings.batch_size, len(validation)), len(validation) % settings.batch_size]
    phased = isinstance(samples, PhasedSamples)
    for positions in samples.lengths() if phased else [samples.positions]:
        check_tokens(layers.fp8, settings.batch_size, positions, rows, validation.positions)


def _refusal(error: Exception, settings: TrainingSettings) -> str:
    """What Lightning or NeMo refuses, in a line, and how a key is removed that an optimiser does not take."""
    first = str(error).splitlines()[0]
    unknown = re.search(r"unexpected keyword argument '(\w+)'", first)
    if unknown and unknown[1] in settings.optim:
        return (
            f"optim.{unknown[1]}: {settings.optim['name']} takes no such argument; "
            f"'~optim.{unknown[1]}' removes it"
        )
    return f"trainer, optim, exp_manager: {first}"


def _fit(trainer: Trainer, model: MinitronModel, state: Path) -> None:
    try:
        trainer.fit(model)
    except MisconfigurationException as error:
        raise ValueError(f"trainer, exp_manager: {str(error).splitlines()[0]}") from error
    finally:
        end_loggers(trainer)
    early = trainer.global_step < trainer.max_steps
    ended = {"step": trainer.global_step, "reason": _ended_by(trainer)} if early else None
    if trainer.is_global_zero:
        (state / STOPPED).unlink(missing_ok=True)
        if ended is not None:
            write_json(state / STOPPED, ended)
        for callback in trainer.callbacks:
            if isinstance(callback, BestWeights):
                callback.put(model.model)


def _ended_by(trainer: Trainer) -> str:
    """What has ended a training before its last step, in words.

    Raises:
        RuntimeError: nothing that is known to.
    """
    timers = [each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer)]
    if any(left is not None and left <= 0 for left in timers):
        return "trainer.max_time"
    if any(trainer.global_step == c.step for c in trainer.callbacks if isinstance(c, StopAfter)):
        return f"{KEY}={trainer.global_step}"
    watched = [each.monitor for each in trainer.callbacks if isinstance(each, EarlyStopping)]
    if trainer.should_stop and watched:
        return f"early stopping on {watched[0]}"
    epochs = trainer.max_epochs or -1
    if 0 < epochs <= trainer.fit_loop.epoch_progress.current.processed:
        return f"trainer.max_epochs={epochs}"
    raise RuntimeError(
        f"training stopped at step {trainer.global_step} of {trainer.max_steps}; its checkpoint stays, run "
        "it again to resume"
    )


def _trainer(settings: TrainingSettings, callbacks: Sequence[Callback], state: Path) -> Trainer:
    arguments, options = dict(settings.trainer), settings.options
    arguments["profiler"] = profiler(arguments.get("profiler"), state)
    own = _made(arguments)
    bars = arguments.get("enable_progress_bar", True) and not any(
        isinstance(callback, ProgressBar) for callback in own
    )
    bar = [TQDMProgressBar(refresh_rate=10)] if bars else []
    average = [] if options.ema_decay is None else [Averaging(options.ema_decay)]
    exact = [ExactResume(settings.seed, options.tensor_parallel), WatchedMetrics()]
    # logger, checkpoints and their folders are exp_manager's; the sampler knows its ranks itself:
    # another value has been refused
    fixed = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    if options.shard:
        fixed["strategy"] = sharding_strategy(options.tensor_parallel)
    callbacks = [*callbacks, *exact, LossGuard(options.spikes), *average, *own, *bar]
    trainer = Trainer(**{**arguments, **fixed}, callbacks=callbacks)
    end_what_was_cut_short(trainer, arguments.get("min_epochs") or 0)
    return trainer


def _made(arguments: dict[str, Any]) -> list[Callback]:
    """The callbacks that NeMo makes of a configuration's ``_target_``; the strategy takes its place.

    ``refuse_trainer`` has looked at both.

    Raises:
        ValueError: they do not take the arguments, or cannot be imported.
    """
    strategy, callbacks = arguments.get("strategy"), arguments.pop("callbacks", None)
    given = {"callbacks": callbacks or []}
    if isinstance(strategy, Mapping):
        given["strategy"] = strategy
    try:
        resolved: dict[str, Any] = resolve_trainer_cfg(OmegaConf.create(given))
    except InstantiationException as error:
        reason = " ".join(str(error).split()).partition(" full_key")[0]
        raise ValueError(f"trainer.{', trainer.'.join(given)}: {reason}") from error
    made: list[Callback] = resolved.pop("callbacks")
    arguments.update(resolved)
    return made


def _watch(
    trainer: Trainer, model: MinitronModel, settings: TrainingSettings, samples: Any, state: Path
) -> None:
    """Adds the training log, and after it the callbacks that may end the training."""
    every = (
        settings.trainer["log_every_n_steps"] if settings.trainer.get("log_every_n_steps") else 10
    )
    readers = trainer.world_size // settings.options.tensor_parallel
    per_step = settings.batch_size * trainer.accumulate_grad_batches * readers
    positions, done = samples.positions, None
    if isinstance(samples, PhasedSamples):
        done = work_of_phases(trainer, model, samples, per_step)
    flops, peak = step_flops(trainer, model, positions), settings.options.peak_tflops
    trainer.callbacks.append(
        TrainingLog(metrics_in(state), every, per_step * positions, flops, peak, done)
    )
    limit = settings.exp_manager.get("max_time_per_run")
    allowed = None if limit is None else duration("exp_manager.max_time_per_run", limit)
    trainer.callbacks.append(Preemption(checkpoints_in(state), allowed, settings.started))
    if settings.options.stop_after is not None:
        trainer.callbacks.append(StopAfter(checkpoints_in(state), settings.options.stop_after))


def _apply(
    settings: TrainingSettings,
    model: MinitronModel,
    device: torch.device,
    samples: Any,
    validation: Any,
) -> None:
    """Prepares the layers of the model that is trained, and its loss.

    Raises:
        ValueError: Transformer Engine is not there, or cannot be had together with something else;
            an average of weights that are split.
    """
    options = settings.options
    if options.only and model.trainer.is_global_zero:
        print(f"training.only: {described(model.model)}", file=sys.stderr, flush=True)
    if options.ema_decay is not None and options.shard:
        raise ValueError(
            "training.ema_decay: not with training.parallel=shard, whose weights are in parts"
        )
    if options.transformer_engine != "off":
        where = "training.transformer_engine"
        if options.tensor_parallel > 1:
            raise ValueError(
                f"{where}: its layers are not split by training.tensor_parallel; use 1"
            )
        if options.transformer_engine == "fp8" and options.activation_checkpointing:
            raise ValueError(
                f"{where}=fp8: training.activation_checkpointing would compute again with other scales; use "
                "on, or no checkpointing"
            )
        if options.compile == "on":
            raise ValueError(
                f"training.compile=on: not with {where}, whose layers torch does not compile; use auto"
            )
        fp8 = options.transformer_engine == "fp8"
        model.replacement_layers = transformer_engine(fp8, options.fp8_recipe)
        _check_fp8(model.replacement_layers, settings, samples, validation)
    alone = options.transformer_engine == "off" and options.tensor_parallel == 1
    model.compiled = is_compiled(options.compile, device, alone)
    if (
        model.compiled
    ):  # validation then runs what training has compiled, where no gradient is wanted
        model.trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
    if options.activation_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
