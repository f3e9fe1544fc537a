"""scores.safetensors: rankings of every axis, and the mergeable sums they were made from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_minitron.core.importance import Moments

FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """Importance scores of one model.

    Attributes:
        ranking: axis name to scores, float64: [units] for scope ``model`` and for ``layers``, [layers,
            units] else.
        sums: axis name to sums over samples ([taps or layers, units]); empty for the baselines.
    """

    ranking: dict[str, Tensor]
    sums: dict[str, Moments]


def write_scores(folder: Path, scores: Scores) -> None:
    """Writes ``scores.safetensors``: ``ranking.AXIS``, ``sums.AXIS.total``, ``.squares`` and ``.samples``."""
    tensors = {f"ranking.{axis}": value.double().contiguous() for axis, value in scores.ranking.items()}
    for axis, sums in scores.sums.items():
        tensors[f"sums.{axis}.total"] = sums.total.contiguous()
        tensors[f"sums.{axis}.squares"] = sums.squares.contiguous()
        tensors[f"sums.{axis}.samples"] = torch.tensor([sums.samples])
    save_file(tensors, folder / FILE)


def read_scores(folder: Path) -> Scores:
    """Reads what ``write_scores`` wrote."""
    tensors = load_file(folder / FILE)
    ranking = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith("ranking.")}
    sums = {
        axis: Moments(
            int(tensors[f"sums.{axis}.samples"]),
            tensors[f"sums.{axis}.total"],
            tensors[f"sums.{axis}.squares"],
        )
        for axis in (name.split(".")[1] for name in tensors if name.endswith(".samples"))
    }
    return Scores(ranking, sums)
