"""What the stages share: their result, and how they find their inputs in a workspace."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.manifest import Input
from nemo_minitron.artifacts.workspace import input_artifact
from nemo_minitron.stages.config import Config, TextConfig


@dataclass(frozen=True)
class Result:
    """What a stage reports.

    Attributes:
        stage: its name.
        folder: its artifact.
        made: False where the artifact was there already.
        headline: one line for the screen.
        columns: column titles of the stage's table, empty where it has none.
        rows: the table's rows.
        facts: the numbers behind it, for ``--json``.
        notes: advice, one line each.
    """

    stage: str
    folder: Path
    made: bool
    headline: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def workspace_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.workspace)


def teacher_folder(config: Config) -> tuple[Path, Input]:
    """The model that is scored, pruned and distilled from: the corrected teacher where correction is on.

    Raises:
        ValueError: it has not been made yet.
    """
    workspace = workspace_of(config)
    if config.correct.enabled:
        return workspace / "correct" / "hf", input_artifact(workspace, "correct", "correct")
    return source_folder(config)


def source_folder(config: Config) -> tuple[Path, Input]:
    """The model that ``download`` points at.

    Raises:
        ValueError: it has not been made yet.
    """
    workspace = workspace_of(config)
    item = input_artifact(workspace, "teacher", "download")
    pointer = json.loads((workspace / "teacher" / "source.json").read_text(encoding="utf-8"))
    return workspace / pointer["path"], item  # an absolute path stays as it is


def distillation_teacher(config: Config) -> tuple[Path, Input]:
    """The model that the student learns from: ``distill.teacher``, or the one that was pruned."""
    if config.distill.teacher is None:
        return teacher_folder(config)
    from nemo_minitron.artifacts.checkpoint import open_checkpoint

    folder = Path(config.distill.teacher)
    return folder, Input(str(folder), open_checkpoint(folder).fingerprint)


def shared_vocabulary(teacher: Path, student: Path) -> int | None:
    """Entries of both vocabularies that count, where they are padded to different sizes; None: all.

    Teacher and student must speak of the same tokens: their tokenizers' files are compared.

    Raises:
        ValueError: they do not.
    """
    from nemo_minitron.artifacts.checkpoint import read_config
    from nemo_minitron.artifacts.side_files import tokenizer_fingerprint
    from nemo_minitron.bridge.models import load_tokenizer

    ours, theirs = read_config(student)["vocab_size"], read_config(teacher)["vocab_size"]
    if ours == theirs and tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student):
        return None
    entries = load_tokenizer(student).get_vocab()
    if load_tokenizer(teacher).get_vocab() != entries:
        raise ValueError(
            f"distill.teacher: {teacher} gives its token ids other meanings than the pruned model's tokenizer"
        )
    return None if ours == theirs else max(entries.values()) + 1


def calibration_mixture(config: Config) -> list[tuple[Any, float]]:
    """Text for scoring and its weights: ``data.calibration``, or what ``data.train`` trains on.

    Raises:
        ValueError: no text, or weights that do not fit the paths.
    """
    own = config.data.calibration
    if own.weights is None:
        if own.paths:
            return [(_find(own, "data.calibration"), 1.0)]
        text = _find(config.data.train, "data.train", _split(config, "train"), config.data.holdout)
        return [(text, 1.0)]
    if own.samples is None:
        raise ValueError("data.calibration.weights: shares of how many samples? set data.calibration.samples")
    return _mixture(own, own.weights, "data.calibration")


def training_mixture(config: Config) -> list[tuple[Any, float]]:
    """Text for training and its weights.

    Raises:
        ValueError: no text, or weights that do not fit the paths.
    """
    own = config.data.train
    if own.weights is None:
        return [(training_text(config), 1.0)]
    return _mixture(own, own.weights, "data.train", _split(config, "train"), config.data.holdout)


def _mixture(
    text: Any, weights: list[float], where: str, side: str = "all", holdout: float = 0.0
) -> list[tuple[Any, float]]:
    paths = text.paths or []
    if len(weights) != len(paths) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"{where}.weights: expected a positive weight for each of {len(paths)} paths, found "
            f"{list(weights)}"
        )
    found = [_find(replace(text, paths=[path]), where, side, holdout) for path in paths]
    return list(zip(found, weights, strict=True))


def training_text(config: Config) -> Any:
    """Text for training: ``data.train`` without what is held out of it."""
    return _find(config.data.train, "data.train", _split(config, "train"), config.data.holdout)


def validation_text(config: Config) -> Any:
    """Text for measuring: ``data.validation``, or what is held out of ``data.train``."""
    own = config.data.validation
    if own.paths:
        return _find(own, "data.validation")
    return _find(config.data.train, "data.train", "held_out", config.data.holdout)


def validation_mixture(config: Config) -> list[tuple[Any, float]]:
    """Text for measuring and its weights: what is held out is mixed as what is trained on."""
    own = config.data.train
    if config.data.validation.paths or own.weights is None:
        return [(validation_text(config), 1.0)]
    return _mixture(own, own.weights, "data.train", "held_out", config.data.holdout)


def held_out_sampling(config: Config, default: int | None = None) -> dict[str, Any]:
    """What decides the samples for measuring, for fingerprints; ``default`` stands for null samples."""
    values, mixed = sampling(config.data.validation, default), len(validation_mixture(config)) > 1
    return {**values, "weights": list(config.data.train.weights or [])} if mixed else values


def _split(config: Config, side: str) -> str:
    return "all" if config.data.validation.paths else side


def _find(text: TextConfig, where: str, side: str = "all", holdout: float = 0.0) -> Any:
    from nemo_minitron.bridge.text import find_text

    if not text.paths:
        raise ValueError(f"{where}.paths: no text given; name files, folders or patterns")
    if side != "all" and not 0 < holdout < 1:
        raise ValueError(f"data.holdout: expected a share between 0 and 1, found {holdout}")
    return find_text(list(text.paths), list(text.exclude), text.format, text.text_key, where, side, holdout)


def text_input(texts: Any) -> Input:
    """A text set as an artifact's input."""
    return Input(f"{texts.where} ({len(texts.files)} files, {texts.side})", texts.fingerprint)


VALIDATION_SAMPLES = 512
"""Samples to measure on where ``data.validation.samples`` is null; fewer where there are fewer."""


def validation_samples(config: Config, tokenizer: Any) -> Any:
    """Packed held-out samples, Tensor of shape [samples, positions + 1]."""
    return validation_packed(config, tokenizer).samples


def validation_packed(config: Config, tokenizer: Any) -> Any:
    """Packed held-out samples with the documents that they are of."""
    from nemo_minitron.bridge.packing import pack_mixture

    own = config.data.validation
    return pack_mixture(
        validation_mixture(config),
        tokenizer,
        own.sequence_length,
        own.samples or VALIDATION_SAMPLES,
        own.seed,
        own.samples is None,
        "data.validation",
    )


def sampling(text: TextConfig, default: int | None = None) -> dict[str, Any]:
    """What decides a text's samples, for fingerprints; ``default`` stands for null samples."""
    values = {"sequence_length": text.sequence_length, "samples": text.samples or default, "seed": text.seed}
    more = {name: getattr(text, name) for name in ("weights", "learn_from") if hasattr(text, name)}
    return values | {name: value for name, value in more.items() if value not in (None, "all")}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``changes`` that are not null, section by section."""
    result = dict(base)
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = merged(result[name], value)
        elif value is not None:
            result[name] = value
    return result


_NOT_DECIDING = (
    "devices",  # what counts is how many samples they read together
    "num_nodes",
    "strategy",
    "accumulate_grad_batches",
    "val_check_interval",  # neither does looking change what is looked at
    "check_val_every_n_epoch",
    "limit_val_batches",
    "num_sanity_val_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
    "default_root_dir",
)


def deciding(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer arguments that decide the weights, for fingerprints.

    What only changes the display, or who does the work, is left out.
    """
    return {name: value for name, value in trainer.items() if name not in _NOT_DECIDING}
