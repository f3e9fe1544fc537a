"""What is cheap to cut: the loss when one axis keeps a part of its units, and without each layer."""

from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.workspace.typed_json import read_json

FILE = "sensitivity.json"
PICTURE = "sensitivity.png"


@dataclass(frozen=True)
class Cutting:
    """One axis cut to one size, all others whole.

    Attributes:
        axis: its name.
        size, share: the units kept, and their share of the source's.
        parameters: those that go, as a share of the source's.
        loss: held-out loss, nats per token; None: it is no number.
        tasks: task to its metrics.
    """

    axis: str
    size: int
    share: float
    parameters: float
    loss: float | None
    tasks: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        loss, tasks: of the whole model.
        axes: one for each axis and size; ``layers`` loses the least important ones.
        layers: loss without each layer alone, by its number.
        left_out: axes that cannot be cut alone, and why.
    """

    loss: float
    tasks: dict[str, dict[str, float]]
    axes: list[Cutting]
    layers: dict[str, float | None]
    left_out: dict[str, str]


def read_sensitivity(folder: Path) -> Sensitivity:
    """Reads what the stage wrote.

    Raises:
        ValueError: the file is damaged.
    """
    found: Sensitivity = read_json(folder / FILE, Sensitivity)
    return found


def price(found: Sensitivity, cut: Cutting) -> float:
    """Nats that a cut costs for each hundredth of the parameters that it saves."""
    if cut.loss is None or cut.parameters <= 0:
        return float("inf")
    return (cut.loss - found.loss) / (100 * cut.parameters)
