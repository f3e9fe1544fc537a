"""The quality gate as a configuration describes it, for evaluate and export."""

from pathlib import Path

from nemo_minitron.artifacts.gate import Gate, measured_of
from nemo_minitron.stages.config import Config

JUDGES = ("min_retention", "floors", "previous", "max_regression")
"""Keys of ``evaluate`` that judge what was measured, and do not change it."""


def gate_of(config: Config) -> Gate:
    """The quality gate that a configuration describes.

    Raises:
        ValueError: a floor that is none, or a previous export without results.
    """
    settings, floors = config.evaluate, []
    for text in settings.floors:
        try:
            task, metric, least = text.rsplit(":", 2)
            floors.append((task, metric, float(least)))
        except ValueError:
            raise ValueError(
                f"evaluate.floors: expected TASK:METRIC:VALUE, as in hellaswag:acc_norm:0.5, found {text!r}"
            ) from None
    previous = None if settings.previous is None else measured_of(Path(settings.previous))
    return Gate(settings.min_retention, tuple(floors), previous, settings.max_regression)
