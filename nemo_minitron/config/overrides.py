"""What of Lightning's Trainer and NeMo's exp_manager a stage does not hand on, refused by name.

A stage owns its folder, its checkpoints and each rank's share of the samples. A key that asks for
something else there would be ignored, or would lose work; docs/nemo.md says what becomes of every
key.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from nemo_minitron.config import batch_limit, handed_on
from nemo_minitron.config.parallel import check_named, check_shard, check_tensor_parallel

_Rules = dict[str, tuple[tuple[Any, ...], str]]
"""Key to the values, beside null, that say what is done anyway, and to what is said of others."""

_OWN_FOLDER = (
    "a stage writes into its own folder, what loggers write into logs/ there; use workspace=FOLDER"
)
_NO_OBJECTS = "a command line holds no Python objects"
_IN_A_SCRIPT = "any other is for a script with MinitronModel"
OBSERVERS = (
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.ModelSummary",
    "lightning.pytorch.callbacks.RichModelSummary",
    "lightning.pytorch.callbacks.RichProgressBar",
    "nemo.collections.common.callbacks.LogEpochTimeCallback",
    "nemo.collections.speechlm2.parts.nsight.NsightProfiling",
)
"""Callbacks that only look: no weight, no checkpoint and no end of a training depends on them."""

STRATEGIES = ("lightning.pytorch.strategies.DDPStrategy",)
"""Strategies with arguments of their own that keep the model whole on every rank."""

TRAINER: _Rules = {
    "fast_dev_run": (
        (False,),
        "its few batches would count as a finished training; use trainer.max_steps=1 in a scratch workspace",
    ),
    "logger": (
        (False,),
        "loggers are exp_manager's; use exp_manager.create_tensorboard_logger=true",
    ),
    "enable_checkpointing": (
        (True,),
        "checkpoints are exp_manager's; use exp_manager.create_checkpoint_callback=false",
    ),
    "use_distributed_sampler": (
        (False,),
        "the order of samples depends on the step alone, and every rank takes its share; leave it out",
    ),
    "plugins": (
        ([],),
        f"{_NO_OBJECTS}; use trainer.precision, trainer.strategy and training.parallel",
    ),
    "default_root_dir": ((), _OWN_FOLDER),
    "overfit_batches": ((0,), "the samples follow from the step; use data.train.samples=N"),
    "barebones": ((False,), "a training needs its checkpoints and its log; leave it out"),
    "limit_test_batches": ((), "a training tests nothing; use the keys of evaluate"),
    "limit_predict_batches": ((), "a training predicts nothing; use the keys of evaluate"),
}
"""Of Lightning's Trainer."""

EXP_MANAGER: _Rules = {
    "explicit_log_dir": ((), _OWN_FOLDER),
    "exp_dir": ((), _OWN_FOLDER),
    "version": ((), _OWN_FOLDER),
    "use_datetime_version": ((False,), _OWN_FOLDER),
    "resume_if_exists": (
        (True,),
        "a workspace always resumes from its newest checkpoint; to start over remove the stage's folder",
    ),
    "resume_ignore_no_checkpoint": (
        (True,),
        "a training without a checkpoint always begins at its first step; leave it out",
    ),
    "resume_past_end": (
        (False,),
        "a finished training stays as it is; for a longer one use trainer.max_steps in another workspace",
    ),
    "resume_from_checkpoint": (
        (),
        "a training resumes from the newest checkpoint of its workspace by itself; to begin with other "
        "weights use source.model",
    ),
    "create_preemption_callback": (
        (True,),
        "a training always saves behind its step at SIGTERM and SIGUSR1; leave it out",
    ),
    "create_ipl_epoch_stopper_callback": (
        (False,),
        "a training ends with a result, not between epochs; use trainer.max_epochs",
    ),
    "create_mlflow_logger": (
        (False,),
        "NeMo 3.0 gives its logger run_name twice, and fails; use track.mlflow=URI",
    ),
    "log_delta_step_timing": (
        (False,),
        "its lines go to NeMo's log, which is silent here; use exp_manager.log_step_timing=true",
    ),
    "ema.enable": ((False,), "its average never becomes the result; use training.ema_decay"),
    "checkpoint_callback_params.dirpath": (
        (),
        "checkpoints lie where the next run looks for them; use workspace=FOLDER",
    ),
    "checkpoint_callback_params.filepath": (
        (),
        "checkpoints lie where the next run looks for them; use workspace=FOLDER",
    ),
    "checkpoint_callback_params.save_weights_only": (
        (False,),
        "nothing could resume from weights alone; leave it out",
    ),
    "checkpoint_callback_params.save_best_model": (
        (False,),
        "training.keep=best:loss, or best:TASK, says which weights become the result",
    ),
    "checkpoint_callback_params.async_save": (
        (False,),
        "it needs a strategy of Megatron's; leave it out",
    ),
    "checkpoint_callback_params.save_last_n_optim_states": (
        (-1,),
        "nothing could resume from a checkpoint without optimiser; use save_top_k",
    ),
    "checkpoint_callback_params.model_parallel_size": (
        (1,),
        "it counts files of Megatron's checkpoints; use training.tensor_parallel",
    ),
}
"""Of NeMo's exp_manager."""

_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")
_CLOCK = re.compile(r"\s*(\d+):(\d\d):(\d\d):(\d\d)\s*")


def duration(name: str, value: Any) -> timedelta:
    """A duration as Lightning's Timer takes it: "DD:HH:MM:SS", or a mapping such as ``{hours: 1}``.

    Raises:
        ValueError: it is neither, or not longer than nothing; YAML reads 10:00:00:00 without quotes as
            a number.
    """
    found = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    parts = (
        dict(zip(("days", "hours", "minutes", "seconds"), map(int, found.groups()), strict=True))
        if found
        else value
    )
    try:
        if isinstance(parts, Mapping) and set(parts) <= {*_UNITS}:
            length = timedelta(**parts)
            if length > timedelta():
                return length
    except (TypeError, ValueError, OverflowError):  # no numbers, or more than there is
        pass
    raise ValueError(
        f"{name}: expected 'DD:HH:MM:SS' in quotes or a mapping such as {{hours: 1}}, more than nothing, "
        f"found {value!r}"
    )


def why_not(key: str, value: Any = ...) -> str | None:
    """Why a key of ``trainer`` or ``exp_manager`` is not handed on, with what to use instead.

    Args:
        key: as on the command line.
        value: what it is set to; left out: any that would be refused.

    Returns:
        None where it is handed on, or says what is done anyway.
    """
    for section, rules in (("trainer", TRAINER), ("exp_manager", EXP_MANAGER)):
        _, found, name = f".{key}".partition(f".{section}.")
        if found and name in rules:
            same, reason = rules[name]
            return None if value is None or value in same else reason
    return None


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _refuse(section: str, values: Mapping[str, Any], rules: _Rules) -> None:
    for name in rules:
        key, value = f"{section}.{name}", _at(values, name)
        if (reason := why_not(key, value)) is not None:
            raise ValueError(f"{key}: {reason} (found {value!r})")


def refuse_trainer(trainer: Mapping[str, Any], section: str = "trainer") -> None:
    """Refuses arguments of Lightning's Trainer that a stage decides itself.

    Raises:
        ValueError: there is one, or one that the Trainer does not have.
    """
    handed_on.refuse_unknown(
        section, trainer, handed_on.TRAINER, "Lightning's Trainer has no such argument"
    )
    _refuse(section, trainer, TRAINER)
    precision = _at(trainer, "precision")
    if precision is not None and str(precision) not in handed_on.PRECISIONS:
        known = ", ".join(handed_on.PRECISIONS)
        raise ValueError(f"{section}.precision: expected one of {known}, found {precision!r}")
    strategy, callbacks = _at(trainer, "strategy"), _at(trainer, "callbacks")
    check_named(section, strategy)
    if strategy is not None and not isinstance(strategy, str):
        other = "the name of one of Lightning's, such as ddp, training.parallel=shard for FSDP2, or"
        _check_object(f"{section}.strategy", strategy, STRATEGIES, other)
    if callbacks is not None and not isinstance(callbacks, list):
        raise ValueError(f"{section}.callbacks: expected a list, found {callbacks!r}")
    for number, callback in enumerate(callbacks or []):
        other = f"a list, in which {_IN_A_SCRIPT}, of"
        _check_object(f"{section}.callbacks[{number}]", callback, OBSERVERS, other)
    if (limit := _at(trainer, "max_time")) is not None:
        duration(f"{section}.max_time", limit)


def _check_object(key: str, given: Any, known: tuple[str, ...], other: str) -> None:
    """Refuses what NeMo would make of a ``_target_``, but for objects that are known to be harmless.

    The target is the user's, by hand or in a configuration of theirs; what is known stays short,
    because a stage resumes, and ends with an artifact, whatever is added to its trainer.
    """
    target = given.get("_target_") if isinstance(given, Mapping) else None
    if target not in known:
        raise ValueError(
            f"{key}: expected {other} {{_target_: ...}} with one of {', '.join(known)}, found {given!r}"
        )
    waiting = [value for name, value in given.items() if name != "_target_"]
    for value in waiting:  # grows while it is read
        if isinstance(value, Mapping) and "_target_" in value:
            raise ValueError(f"{key}: expected plain values beside _target_, found {value!r}")
        waiting += [*value.values()] if isinstance(value, Mapping) else []
        waiting += value if isinstance(value, list) else []


def refuse_exp_manager(settings: Mapping[str, Any]) -> None:
    """Refuses what would take checkpoints and logs out of a stage's folder, or make them useless.

    Raises:
        ValueError: there is such a key, or one that exp_manager does not know.
    """
    handed_on.refuse_unknown(
        "exp_manager", settings, handed_on.EXP_MANAGER, "NeMo's exp_manager has no such key"
    )
    _refuse("exp_manager", settings, EXP_MANAGER)
    where, saved = "exp_manager.checkpoint_callback_params", "checkpoint_callback_params"
    if (limit := _at(settings, "max_time_per_run")) is not None:
        duration("exp_manager.max_time_per_run", limit)
    for name in ("name", f"{saved}.prefix", f"{saved}.postfix", f"{saved}.filename"):
        if isinstance(text := _at(settings, name), str) and "/" in text:
            raise ValueError(
                f"exp_manager.{name}: expected a file's name, without a folder, found {text!r}"
            )
    if not str(_at(settings, f"{saved}.postfix") or ".nemo").endswith(".nemo"):
        raise ValueError(f"{where}.postfix: expected a name's end of .nemo")
    if settings.get("create_checkpoint_callback") is not False:
        _check_checkpoints(where, _at(settings, saved))


def _check_checkpoints(where: str, saved: Any) -> None:
    """Refuses checkpoints of which the newest cannot be found, or which two clocks would write."""
    name, names_itself = _at(saved, "filename"), _at(saved, "auto_insert_metric_name") is not False
    if not isinstance(name, str) or not re.search(
        r"\{step\b" if names_itself else r"step=\{step\b", name
    ):
        step = "{step}" if names_itself else "step={step} with auto_insert_metric_name=false"
        raise ValueError(
            f"{where}.filename: expected {step}, by which the newest is found, found {name!r}"
        )
    if (interval := _at(saved, "train_time_interval")) is None:
        return
    duration(f"{where}.train_time_interval", interval)
    for other in ("every_n_train_steps", "every_n_epochs"):
        if _at(saved, other):
            raise ValueError(
                f"{where}: train_time_interval and {other} exclude each other; add {where}.{other}=null"
            )


def check_overrides(config: Mapping[str, Any]) -> None:
    """Refuses what a stage would ignore of ``trainer`` and ``exp_manager``, by all of the configuration.

    Raises:
        ValueError: there is such a key; the message names it, and what to use instead.
    """
    refuse_exp_manager(config["exp_manager"])
    training = config["training"]
    stopping = config["exp_manager"].get("early_stopping_callback_params") or {}
    monitor = str(stopping.get("monitor"))
    # which measures a task has, who loads it knows
    measures = [monitor] if monitor.rpartition(":")[0] in training["tasks"] else []
    handed_on.check_monitors(config["exp_manager"], handed_on.logged(handed_on.TAUGHT), measures)
    if training["fp8_recipe"] != "auto" and training["transformer_engine"] != "fp8":
        raise ValueError(
            f"training.fp8_recipe={training['fp8_recipe']}: says how FP8 scales, and nothing runs in it; add "
            "training.transformer_engine=fp8"
        )
    check_tensor_parallel(training["tensor_parallel"], training["parallel"] == "shard")
    sections = ("trainer", "pretrain.trainer", "correct.trainer")
    for section in sections:
        trainer = _at(config, section)
        refuse_trainer(trainer, section)
        _check_epochs(f"{section}.max_epochs", _at(trainer, "max_epochs"), config)
        if config["training"]["parallel"] == "shard":
            check_shard(section, _at(trainer, "strategy"))
    batch_limit.check_sections(config, sections)
    if config["training"]["parallel"] == "shard":
        _check_archives(config["exp_manager"], "parallel=shard, whose weights are in parts")
    if config["training"]["ema_decay"] is not None:
        _check_archives(config["exp_manager"], "ema_decay, whose average comes out later")


def _check_epochs(key: str, epochs: Any, config: Mapping[str, Any]) -> None:
    if epochs is None or epochs == -1:
        return
    if epochs < 1:
        raise ValueError(f"{key}: expected at least 1, or -1 for no limit, found {epochs!r}")
    if config["data"]["train"]["samples"] is None:
        raise ValueError(
            f"{key}: counts passes over data.train.samples, which is null: as many samples as the steps "
            f"take; set it, or use trainer.max_steps alone (found {epochs!r})"
        )


def _check_archives(settings: Mapping[str, Any], other: str) -> None:
    for name in ("save_nemo_on_train_end", "always_save_nemo"):
        if _at(settings, f"checkpoint_callback_params.{name}"):
            raise ValueError(
                f"exp_manager.checkpoint_callback_params.{name}: not with training.{other}; use "
                "export.nemo=true"
            )


NEMO_KEYS = {
    "model.optim": "optim",
    "model.global_batch_size": "distill.batch_size, times trainer.accumulate_grad_batches and the ranks",
    "model.micro_batch_size": "distill.batch_size",
    "model.train_ds.batch_size": "distill.batch_size",
    "model.validation_ds.batch_size": "distill.batch_size",
    "model.train_ds": "data.train.paths",
    "model.validation_ds": "data.validation.paths",
    "model.data": "data.train.paths",
    "model.encoder_seq_length": "data.train.sequence_length",
    "model.max_position_embeddings": "data.train.sequence_length",
    "model.tokenizer": "source.model, whose tokenizer is taken",
    "model.restore_from_path": "source.model",
    "model.precision": "trainer.precision",
    "model.seed": "distill.seed",
    "model.activations_checkpoint_method": "training.activation_checkpointing",
    "model.activations_checkpoint_granularity": "training.activation_checkpointing",
    "model.tensor_model_parallel_size": "training.tensor_parallel",
    "model.fp8": "training.transformer_engine=fp8",
    "model": "source.model",
    "restore_from_path": "source.model",
    "init_from_nemo_model": "source.model",
    "name": "workspace",
}
"""Keys as NeMo's scripts name them, to what does the same here."""


def ours(key: str) -> str | None:
    """What a key of NeMo's scripts is called here; None where it is none, or has no like."""
    found = next((name for name in NEMO_KEYS if f"{key}.".startswith(f"{name}.")), None)
    if found is None:
        return None
    return NEMO_KEYS[found] + (key.removeprefix(found) if found == "model.optim" else "")
