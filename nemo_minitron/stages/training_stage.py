"""What the three training stages have in common: their text, their recipe, and the model they write."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from nemo_minitron.config.config import Config
from nemo_minitron.config.handed_on import check_monitors, logged
from nemo_minitron.config.training_config import TrainingConfig
from nemo_minitron.data.mixtures import (
    sampling,
    text_input,
    training_mixture,
    validation_samples,
    validation_text,
)
from nemo_minitron.data.training_samples import training_samples
from nemo_minitron.families import family_of
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.stages.inputs import length_notes
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.training.trainer_arguments import deciding, merged
from nemo_minitron.workspace import training_log
from nemo_minitron.workspace.layout import metrics_in, model_in
from nemo_minitron.workspace.manifest import Input, Manifest, read_manifest, write_json
from nemo_minitron.workspace.typed_json import read_json


@dataclass(frozen=True)
class Role:
    """What makes a training pretraining, correction or distillation; called only where one is due.

    Attributes:
        tokenizer: gives the tokenizer that packs the text; called after ``prepare``.
        start: gives the model to train, its config.json, and the folder whose side files it carries
            on.
        callbacks: gives the Lightning callbacks.
        prepare: called first.
        shape: gives config.json of the model that is trained, without loading it.
        terms: terms of the loss beside cross-entropy (``config.handed_on.TAUGHT``).
        wrap_samples: what becomes of the training and the validation samples before they are read.
    """

    tokenizer: Callable[[], Any]
    start: Callable[[], tuple[Any, dict[str, Any], Path | None]]
    shape: Callable[[], Mapping[str, Any]]
    callbacks: Callable[[], list[Any]] = list
    prepare: Callable[[], None] = lambda: None
    terms: Sequence[str] = ()
    wrap_samples: Callable[[Any, Any], tuple[Any, Any]] = lambda samples, validation: (
        samples,
        validation,
    )


SKIPPED = "skipped.json"
"""Steps that a training left out: number, which samples (as those of a step without any left out), reason."""


_FROM_NOISE = ("pretrain", "scratch")
"""Kinds of models that begin with random weights: ``training.only`` would leave them what they are."""


class _Skip(TypedDict):
    step: int
    samples_of_step: int
    reason: str


def training_inputs(config: Config) -> list[Input]:
    """Training and validation text as inputs."""
    texts = [texts for texts, _ in training_mixture(config)]
    return [*map(text_input, texts), text_input(validation_text(config))]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from nemo_minitron.models.causal_lm import load_tokenizer

    return load_tokenizer(folder)


def training_recipe(
    folder: Path,
    kind: str,
    config: Config,
    section: Mapping[str, Any],
    inputs: Sequence[Input],
    role: Role,
) -> Recipe:
    """The recipe of a trained model as an artifact: ``hf/`` and ``metrics.jsonl``.

    Args:
        folder: the artifact's folder.
        kind: its kind.
        config: the whole configuration.
        section: the stage's own keys: ``batch_size``, ``seed``, ``trainer``, ``optim`` and what
            else decides.
        inputs: what it is made from.
        role: the rest.
    """
    if kind in _FROM_NOISE:
        config = replace(config, training=replace(config.training, only=[]))
    resolved, decides = _resolved(config, section)

    def check() -> None:
        validates = resolved["trainer"].get("limit_val_batches") != 0
        check_monitors(config.exp_manager, logged(role.terms, validates))
        # NeMo's import takes seconds: only where due
        from nemo_minitron.plugin.trainer import check_trainer

        check_trainer(resolved["trainer"])
        if config.training.only:
            from nemo_minitron.models.trainable import check_only

            shape = role.shape()
            check_only(shape, family_of(shape), config.training.only)

    def build(state: Path, target: Path, ranks: Ranks) -> None:
        """Trains, all ranks together, and writes what came of it."""
        ranks.first(role.prepare)
        trained = _train(config, resolved, role, state, ranks)
        if ranks.rank == 0:
            _write(trained, state, target)

    def summary() -> Summary:
        notes = length_notes(config, role.shape(), "train", "validation")
        return Summary(last_losses(folder), notes=notes)

    return Recipe(folder, kind, decides, inputs, build, summary, check, resumable=True, keep=True)


def _write(trained: Any, state: Path, target: Path) -> None:
    """Writes what came of a training."""
    model_in(target).mkdir()
    trained.save_hf(model_in(target))
    from nemo_minitron.plugin.experiment import keep_logs

    keep_logs(state, target)
    log = metrics_in(state)
    training_log.write_csv(training_log.read_log(log), target / training_log.TABLE)
    for name in (log.name, SKIPPED, training_log.TEACHERS, training_log.STOPPED):
        if (state / name).is_file():
            (target / name).write_bytes((state / name).read_bytes())


def _resolved(config: Config, section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage's keys with trainer and optimiser filled in, and what of them decides the weights."""
    trainer = resolved_trainer(config, section["trainer"], section["batch_size"])
    optim = merged(config.optim, section["optim"])
    resolved = {
        **{key: section[key] for key in section if key not in ("enabled", "baseline")},
        "trainer": trainer,
        "optim": optim,
    }
    step = samples_a_step(config, trainer, section["batch_size"])
    decides = {
        **resolved,
        "trainer": deciding(trainer),
        "batch_size": step,
        "training": _deciding(config.training),
        "train": sampling(config.data.train),
        **_early_stopping(config.exp_manager, trainer),
    }
    return resolved, decides


def _early_stopping(manager: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What may end the training early, and when it looks; nothing where nothing may."""
    if not manager.get("create_early_stopping_callback"):
        return {}
    looks = {name: trainer.get(name) for name in ("val_check_interval", "limit_val_batches")}
    if isinstance(looks["val_check_interval"], int):  # in steps, however many devices there are
        looks["val_check_interval"] /= trainer.get("accumulate_grad_batches") or 1
    return {"early_stopping": {**(manager.get("early_stopping_callback_params") or {}), **looks}}


def _deciding(training: TrainingConfig) -> dict[str, Any]:
    """What of ``training`` decides the weights; where the default was always the rule, nothing.

    Not what a bad loss does: whoever is stopped by one must be able to go on, and what was left out
    lies beside the weights.
    """
    named = ("ema_decay", "transformer_engine", "fp8_recipe", "only")
    default = TrainingConfig()
    values = {name: getattr(training, name) for name in named}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


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
    if config.training.validate_every is not None and changes.get("val_check_interval") is None:
        per_step = trainer.get("accumulate_grad_batches") or 1
        trainer["val_check_interval"] = config.training.validate_every * per_step
    return trainer


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


def _train(
    config: Config, section: Mapping[str, Any], role: Role, state: Path, ranks: Ranks
) -> Any:
    from nemo_minitron.plugin.trainer import TrainingSettings, train
    from nemo_minitron.training.loss_guard import BadStep

    trainer = section["trainer"]
    tokenizer = role.tokenizer()
    needed = samples_for(config, trainer, section["batch_size"])
    per_step = samples_a_step(config, trainer, section["batch_size"])
    samples = training_samples(config, tokenizer, needed, per_step, ranks)
    samples, validation = role.wrap_samples(samples, validation_samples(config, tokenizer))
    settings = TrainingSettings(
        trainer, section["optim"], config.exp_manager, section["batch_size"], section["seed"],
        _options(config.training),
    )  # fmt: skip
    while True:
        model, hf_config, files = role.start()
        skips = _skips(state)
        skipped = frozenset(skip["samples_of_step"] - 1 for skip in skips)
        try:
            return train(
                model,
                hf_config,
                files,
                settings,
                samples,
                validation,
                state,
                role.callbacks(),
                skipped,
            )
        except BadStep as bad:
            most = config.training.max_skips
            if config.training.on_bad_loss == "stop" or len(skips) >= most:
                raise
            ranks.first(partial(_leave_out, bad, skips, most, state))


def _options(training: TrainingConfig) -> Any:
    from nemo_minitron.plugin.trainer import Options
    from nemo_minitron.training.loss_guard import Spikes

    spikes = Spikes(training.spike_factor, training.spike_window)
    return Options(
        training.activation_checkpointing, training.compile, training.ema_decay, spikes, training.peak_tflops,
        training.parallel == "shard", training.tensor_parallel, training.transformer_engine,
        training.fp8_recipe, tuple(training.only),
    )  # fmt: skip


def _skips(state: Path) -> list[dict[str, Any]]:
    path = state / SKIPPED
    found: list[dict[str, Any]] = read_json(path, list[_Skip]) if path.is_file() else []
    return found


def _leave_out(bad: Any, skips: list[dict[str, Any]], most: int, state: Path) -> None:
    """Notes a bad step, whose samples the training then does without."""
    from nemo_minitron.training.sampler import kept_batches

    known = frozenset(skip["samples_of_step"] - 1 for skip in skips)
    (source,) = kept_batches(bad.step, bad.step + 1, known)
    skips.append({"step": bad.step + 1, "samples_of_step": source + 1, "reason": bad.reason})
    write_json(state / SKIPPED, skips)
    print(
        f"step {bad.step + 1}: {bad.reason}; back to the last checkpoint, and on without the samples of this "
        f"step ({len(skips)} of at most {most} steps left out)",
        file=sys.stderr,
        flush=True,
    )


def last_losses(folder: Path) -> str:
    """The end of a training in words, from its log."""
    lines = training_log.read_log(metrics_in(folder))
    validated = [line for line in lines if "val_loss" in line][-1:]
    manifest = read_manifest(folder)
    assert manifest is not None
    steps, of, ended = _max_steps(manifest), "", ""  # the log has lines of some steps only
    if (stop := training_log.read_stop(folder)) is not None:
        steps, of, ended = stop["step"], f" of {steps}", f", ended by {stop['reason']}"
    left_out = f", {len(skips)} left out ({SKIPPED})" if (skips := _skips(folder)) else ""
    told = "".join(
        f", held-out loss {line['val_loss']:.4f}"
        + (f" at step {line['step']}" if line["step"] != steps else "")
        for line in validated
    )
    return f"{steps}{of} steps{ended}{left_out}{told}"


def _max_steps(manifest: Manifest) -> int:
    """Steps that a training was to take: it ends with the last of them, fails, or notes where it ended."""
    steps: int = manifest.config["trainer"]["max_steps"]
    return steps
