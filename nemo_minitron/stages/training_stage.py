"""What the three training stages have in common: their text, their recipe, and the model they write."""

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
    VALIDATION_SAMPLES,
    held_out_sampling,
    sampling,
    text_input,
    training_mixture,
    validation_samples,
    validation_text,
)
from nemo_minitron.data.training_phases import (
    PhaseText,
    phase_configs,
    phases_decide,
    same_samples,
)
from nemo_minitron.data.training_samples import training_samples
from nemo_minitron.families import family_of
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.stages.going_on import (
    FROM,
    STOP,
    check_parts,
    check_stop,
    given,
    keep_state,
    take_over,
)
from nemo_minitron.stages.inputs import length_notes
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.stages.training_choices import (
    check_choices,
    check_stopping,
    stops_on_task,
    watching,
)
from nemo_minitron.stages.training_choices import (
    decides as choices_decide,
)
from nemo_minitron.stages.training_steps import (
    phases_of,
    resolved_trainer,
    samples_a_step,
    samples_for,
)
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
    first, *others = (
        [text_input(texts) for texts, _ in training_mixture(each)] for each in phase_configs(config)
    )
    new = dict.fromkeys(text for texts in others for text in texts if text not in first)
    return [*first, *new, text_input(validation_text(config))]


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
    phases = phases_of(config, section["trainer"], section["batch_size"])

    def check() -> None:
        check_parts(config, section)
        validates = resolved["trainer"].get("limit_val_batches") != 0
        measures = check_choices(config, resolved["trainer"])
        check_monitors(config.exp_manager, logged(role.terms, validates), measures)
        check_stopping(config.exp_manager, measures)
        # NeMo's import takes seconds: only where due
        from nemo_minitron.plugin.trainer import check_trainer

        check_trainer(resolved["trainer"])
        check_stop(section, resolved["trainer"]["max_steps"])
        if config.training.only:
            from nemo_minitron.models.trainable import check_only

            shape = role.shape()
            check_only(shape, family_of(shape), config.training.only)

    def build(state: Path, target: Path, ranks: Ranks) -> None:
        """Trains, all ranks together, and writes what came of it."""
        ranks.first(role.prepare)
        notes = (SKIPPED, training_log.TEACHERS)
        ranks.first(lambda: take_over(given(section, FROM), decides, inputs, state, notes))
        trained = _train(config, resolved, phases, role, state, ranks)
        if ranks.rank == 0:
            _write(trained, state, target, given(section, STOP) is not None)

    def summary() -> Summary:
        shape = role.shape()
        lengths = [length_notes(each, shape, "train") for each in phase_configs(config)]
        found = [note for notes in lengths for note in notes]
        found += length_notes(config, shape, "validation")
        return Summary(last_losses(folder), notes=tuple(dict.fromkeys(found)))

    return Recipe(folder, kind, decides, inputs, build, summary, check, resumable=True, keep=True)


def _write(trained: Any, state: Path, target: Path, stopped: bool) -> None:
    """Writes what came of a training, and its state where it was stopped to go on another time."""
    model_in(target).mkdir()
    trained.save_hf(model_in(target))
    from nemo_minitron.plugin.experiment import keep_logs

    keep_logs(state, target)
    log = metrics_in(state)
    training_log.write_csv(training_log.read_log(log), target / training_log.TABLE)
    noted = (SKIPPED, training_log.TEACHERS, training_log.STOPPED, training_log.KEPT)
    for name in (log.name, *noted):
        if (state / name).is_file():
            (target / name).write_bytes((state / name).read_bytes())
    if stopped:
        keep_state(state, target)


def _resolved(config: Config, section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage's keys with trainer and optimiser filled in, and what of them decides the weights."""
    trainer = resolved_trainer(config, section["trainer"], section["batch_size"])
    optim = merged(config.optim, section["optim"])
    resolved = {
        **{key: section[key] for key in section if key not in ("enabled", "baseline", FROM)},
        "trainer": trainer,
        "optim": optim,
    }
    step = samples_a_step(config, trainer, section["batch_size"])
    decides = {
        **resolved,
        "trainer": deciding(trainer),
        "batch_size": step,
        "training": {**_deciding(config.training), **phases_decide(config)},
        "train": sampling(config.data.train),
        **_early_stopping(config, trainer),
        **choices_decide(config, trainer),
    }
    return resolved, decides


def _early_stopping(config: Config, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What may end the training early, and when it looks; nothing where nothing may."""
    manager = config.exp_manager
    if not manager.get("create_early_stopping_callback"):
        return {}
    looks = {name: trainer.get(name) for name in ("val_check_interval", "limit_val_batches")}
    if isinstance(looks["val_check_interval"], int):  # in steps, however many devices there are
        looks["val_check_interval"] /= trainer.get("accumulate_grad_batches") or 1
    given = manager.get("early_stopping_callback_params") or {}
    return {"early_stopping": {**given, **looks, **_looks_at(config), **stops_on_task(config)}}


def _looks_at(config: Config) -> dict[str, Any]:
    """Which held-out samples early stopping sees, where they are not those of the defaults."""
    usual = sampling(type(config.data.validation)(), VALIDATION_SAMPLES)
    own = held_out_sampling(config, VALIDATION_SAMPLES)
    other = {name: value for name, value in own.items() if usual.get(name) != value}
    return {"validation": other} if other else {}


def _deciding(training: TrainingConfig) -> dict[str, Any]:
    """What of ``training`` decides the weights; where the default was always the rule, nothing.

    Not what a bad loss does: whoever is stopped by one must be able to go on, and what was left out
    lies beside the weights.
    """
    named = ("ema_decay", "transformer_engine", "fp8_recipe", "only")
    default = TrainingConfig()
    values = {name: getattr(training, name) for name in named}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _train(
    config: Config,
    section: Mapping[str, Any],
    phases: Sequence[PhaseText],
    role: Role,
    state: Path,
    ranks: Ranks,
) -> Any:
    from nemo_minitron.plugin.trainer import TrainingSettings, train
    from nemo_minitron.training.loss_guard import BadStep

    trainer = section["trainer"]
    tokenizer = role.tokenizer()
    samples = _samples(config, section, phases, tokenizer, ranks)
    samples, validation = role.wrap_samples(samples, validation_samples(config, tokenizer))
    settings = TrainingSettings(
        trainer, section["optim"], config.exp_manager, section["batch_size"], section["seed"],
        replace(_options(config.training), stop_after=given(section, STOP)),
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
                [*watching(config, tokenizer, state), *role.callbacks()],
                skipped,
            )
        except BadStep as bad:
            most = config.training.max_skips
            if config.training.on_bad_loss == "stop" or len(skips) >= most:
                raise
            ranks.first(partial(_leave_out, bad, skips, most, state))


def _samples(
    config: Config,
    section: Mapping[str, Any],
    phases: Sequence[PhaseText],
    tokenizer: Any,
    ranks: Ranks,
) -> Any:
    """The samples of a training: of one text, or of each of its phases."""
    trainer, batch_size = section["trainer"], section["batch_size"]
    per_step = samples_a_step(config, trainer, batch_size)
    if not phases:
        needed = samples_for(config, trainer, batch_size)
        return training_samples(config, tokenizer, needed, per_step, ranks)
    from nemo_minitron.training.phases import Phase, PhasedSamples

    made: list[tuple[Config, Any]] = []
    for each in phases:
        if not any(same_samples(each.config, own) for own, _ in made):
            steps = sum(p.steps for p in phases if same_samples(p.config, each.config))
            needed = samples_for(each.config, {**trainer, "max_steps": steps}, batch_size)
            samples = training_samples(each.config, tokenizer, needed, per_step, ranks)
            made.append((each.config, samples))
    pools = [next(s for own, s in made if same_samples(each.config, own)) for each in phases]
    usual = section["optim"]["lr"]
    rates = [1.0 if each.lr is None else each.lr / usual for each in phases]
    return PhasedSamples(
        [Phase(p.steps, pool, rate) for p, pool, rate in zip(phases, pools, rates, strict=True)]
    )


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
    if (kept := training_log.read_kept(folder)) is not None:
        ended += f", kept those of step {kept['step']} ({kept['measure']} {kept['value']:.4f})"
    more = "".join(
        f", held-out loss {line['val_loss']:.4f}"
        + (f" at step {line['step']}" if line["step"] != steps else "")
        for line in validated
    )
    return f"{steps}{of} steps{ended}{left_out}{more}"


def _max_steps(manifest: Manifest) -> int:
    """Steps that a training was to take: it ends with the last of them, fails, or notes where it ended."""
    steps: int = manifest.config["trainer"]["max_steps"]
    return steps
