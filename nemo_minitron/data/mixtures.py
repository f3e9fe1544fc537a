"""Texts that the configuration names for scoring, training and measuring, and what decides their samples."""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.config.data_config import TextConfig
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import Input


def calibration_mixture(config: Config) -> list[tuple[Any, float]]:
    """Text for scoring and its weights: ``data.calibration``, or what ``data.train`` trains on.

    Raises:
        ValueError: no text, or weights that do not fit the paths.
    """
    own = config.data.calibration
    if own.weights is None:
        if own.paths:
            return [(_find(config, own, "data.calibration"), 1.0)]
        return [(training_text(config), 1.0)]
    if own.samples is None:
        raise ValueError(
            "data.calibration.weights: shares of how many samples? set data.calibration.samples"
        )
    return _mixture(config, own, own.weights, "data.calibration")


def training_mixture(config: Config) -> list[tuple[Any, float]]:
    """Text for training and its weights.

    Raises:
        ValueError: no text, or weights that do not fit the paths.
    """
    own = config.data.train
    if own.weights is None:
        return [(training_text(config), 1.0)]
    return _mixture(config, own, own.weights, "data.train", _split(config, "train"))


def _mixture(
    config: Config, text: Any, weights: list[float], where: str, side: str = "all"
) -> list[tuple[Any, float]]:
    paths = text.paths or []
    if len(weights) != len(paths) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"{where}.weights: expected a positive weight for each of {len(paths)} paths, found "
            f"{list(weights)}"
        )
    found = [_find(config, replace(text, paths=[path]), where, side) for path in paths]
    return list(zip(found, weights, strict=True))


def training_text(config: Config) -> Any:
    """Text for training: ``data.train`` without what is held out of it."""
    return _find(config, config.data.train, "data.train", _split(config, "train"))


def validation_text(config: Config) -> Any:
    """Text for measuring: ``data.validation``, or what is held out of ``data.train``."""
    own = config.data.validation
    if own.paths:
        return _find(config, own, "data.validation")
    return _find(config, config.data.train, "data.train", "held_out")


def validation_mixture(config: Config) -> list[tuple[Any, float]]:
    """Text for measuring and its weights: what is held out is mixed as what is trained on."""
    own = config.data.train
    if config.data.validation.paths or own.weights is None:
        return [(validation_text(config), 1.0)]
    return _mixture(config, own, own.weights, "data.train", "held_out")


def held_out_windows(config: Config, tokenizer: Any) -> dict[str, Any]:
    """What decides the samples that are measured on, and what each begins with where that is anything."""
    from nemo_minitron.data.tokenisation import begin_tokens

    begin = begin_tokens(tokenizer).tolist()
    return held_out_sampling(config, VALIDATION_SAMPLES) | ({"begin": begin} if begin else {})


def held_out_sampling(config: Config, default: int | None = None) -> dict[str, Any]:
    """What decides the samples for measuring, for fingerprints; ``default`` stands for null samples."""
    values, mixed = sampling(config.data.validation, default), len(validation_mixture(config)) > 1
    return {**values, "weights": list(config.data.train.weights or [])} if mixed else values


def _split(config: Config, side: str) -> str:
    return "all" if config.data.validation.paths else side


def _find(config: Config, text: TextConfig, where: str, side: str = "all") -> Any:
    from nemo_minitron.data.documents import find_text

    if not text.paths:
        raise ValueError(f"{where}.paths: no text given; name files, folders or patterns")
    holdout, workspace = config.data.holdout, Workspace(workspace_of(config))
    if side != "all" and not 0 < holdout < 1:
        raise ValueError(f"data.holdout: expected a share between 0 and 1, found {holdout}")
    return find_text(
        list(text.paths), list(text.exclude), text.format, text.text_key, where, side, holdout,
        workspace.data_commits,
    )  # fmt: skip


def text_input(texts: Any) -> Input:
    """A text set as an artifact's input."""
    return Input(texts.described(), texts.fingerprint)


VALIDATION_SAMPLES = 512
"""Samples to measure on where ``data.validation.samples`` is null; fewer where there are fewer."""


def validation_samples(config: Config, tokenizer: Any) -> Any:
    """Packed held-out samples, Tensor of shape [samples, positions + 1]."""
    return validation_packed(config, tokenizer).samples


def validation_packed(config: Config, tokenizer: Any) -> Any:
    """Packed held-out samples with the documents that they are of."""
    from nemo_minitron.data.windows import pack_mixture

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
    values = {
        "sequence_length": text.sequence_length,
        "samples": text.samples or default,
        "seed": text.seed,
    }
    more = {name: getattr(text, name) for name in ("weights", "learn_from") if hasattr(text, name)}
    return values | {name: value for name, value in more.items() if value not in (None, "all")}
