"""``training.phases``: what each phase of a training reads, and for how long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_minitron.config.config import Config
from nemo_minitron.config.training_config import PhaseConfig
from nemo_minitron.data.mixtures import training_mixture

_WHERE = "training.phases"


@dataclass(frozen=True)
class PhaseText:
    """A phase of a training.

    Attributes:
        config: the configuration as the phase has it: its text is ``data.train``.
        steps: how many it takes.
        lr: its learning rate, or None: that of the training.
    """

    config: Config
    steps: int
    lr: float | None


def phase_configs(config: Config) -> list[Config]:
    """The configuration as each phase has it; of a training without phases as it is.

    Raises:
        ValueError: shares that are not the whole, or a text of which some is held out for validation
            by another split than the training's.
    """
    phases = config.training.phases
    if not phases:
        return [config]
    total = sum(phase.share for phase in phases)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{_WHERE}: expected shares that add up to 1, found {total:g}")
    return [_as_phase(config, phase, number) for number, phase in enumerate(phases)]


def _as_phase(config: Config, phase: PhaseConfig, number: int) -> Config:
    text, where = config.data.train, f"{_WHERE}[{number}]"
    other = phase.paths is not None or (phase.weights is not None) != (text.weights is not None)
    if other and _changes(phase) and not config.data.validation.paths:
        raise ValueError(
            f"{where}: reads a mixture of its own, and might read what is held out of data.train for "
            "validation; name data.validation.paths"
        )
    changed = replace(
        text,
        sequence_length=phase.sequence_length or text.sequence_length,
        paths=phase.paths if phase.paths is not None else text.paths,
        weights=phase.weights if _changes(phase) else text.weights,
    )
    paths = changed.paths or []
    if changed.weights is not None and len(changed.weights) != len(paths):
        raise ValueError(
            f"{where}.weights: expected a weight for each of {len(paths)} paths, found "
            f"{list(changed.weights)}"
        )
    return replace(config, data=replace(config.data, train=changed))


def _changes(phase: PhaseConfig) -> bool:
    return phase.paths is not None or phase.weights is not None


def phase_texts(config: Config, tokens: int, samples_a_step: int) -> list[PhaseText]:
    """The phases of a training of so many tokens; a training without phases has one.

    Args:
        config: the whole configuration.
        tokens: of the training.
        samples_a_step: over all ranks, the same in every phase.

    Raises:
        ValueError: see ``phase_configs``; or a share is less than a step.
    """
    found: list[PhaseText] = []
    for number, (own, phase) in enumerate(
        zip(phase_configs(config), config.training.phases, strict=True)
    ):
        per_step = samples_a_step * own.data.train.sequence_length
        steps = round(phase.share * tokens / per_step)
        if steps < 1:
            raise ValueError(
                f"{_WHERE}[{number}].share: {phase.share:g} of {tokens:,} tokens is less than a step, which "
                f"takes {per_step:,}"
            )
        found.append(PhaseText(own, steps, phase.lr))
    return found


def same_samples(one: Config, other: Config) -> bool:
    """Whether two phases read the same samples, so that one goes on where the other has ended."""
    return one.data.train == other.data.train


def phases_decide(config: Config) -> dict[str, Any]:
    """What decides the phases, for fingerprints; nothing without any.

    Where one has paths of its own, the texts of each, in order: the inputs of a training name each text once.
    """
    keys = ("share", "sequence_length", "weights", "lr")
    phases: Sequence[PhaseConfig] = config.training.phases
    if not phases:
        return {}
    rows = [{key: getattr(phase, key) for key in keys} for phase in phases]
    if any(phase.paths is not None for phase in phases):
        for row, own in zip(rows, phase_configs(config), strict=True):
            row["texts"] = [texts.fingerprint for texts, _ in training_mixture(own)]
    return {"phases": [{key: row[key] for key in row if row[key] is not None} for row in rows]}
