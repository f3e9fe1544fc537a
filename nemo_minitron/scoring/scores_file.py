"""scores.safetensors: rankings of every axis, and the mergeable sums they were made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_minitron.families import Family
from nemo_minitron.pruning.select import score_shape
from nemo_minitron.scoring.calibration_sums import CalibrationSums
from nemo_minitron.scoring.depth import DepthSums
from nemo_minitron.scoring.importance import Moments
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.artifacts import check_file
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.tensor_file import read_tensors
from nemo_minitron.workspace.typed_json import read_json, remedy

FILE = "scores.safetensors"
SAMPLES = "samples.json"
ROUTING = "routing.json"


class _Text(TypedDict):
    text: str
    tokens_of_experts: list[list[int]]


class _Routing(TypedDict):
    texts: list[_Text]


@dataclass(frozen=True)
class Scores:
    """Importance scores of one model.

    Attributes:
        ranking: axis name to scores, float64: [units] for scope ``model`` and for ``layers``,
            [layers, units] or [layers, experts, units] else.
        calibration: the sums behind them, and the samples they are over; empty for the baselines.
        greedy: layers in the order in which greedy removal took them; empty where it was not asked
            for.
    """

    ranking: dict[str, Tensor]
    calibration: CalibrationSums = field(default_factory=CalibrationSums)
    greedy: tuple[int, ...] = ()


def write_scores(folder: Path, scores: Scores, texts: Sequence[str] = ()) -> None:
    """Writes ``scores.safetensors`` and, where there are calibration samples, ``samples.json``.

    Where the tokens of experts were counted for each text, also ``routing.json``: the texts' names
    and, by layer, the tokens that came to each expert.

    Names: ``ranking.AXIS``; ``sums.AXIS.AGGREGATION.`` and ``total``, ``squares``, ``samples``;
    ``routed.AXIS``; ``depth.METRIC.LENGTH.`` and ``total``, ``base``, ``count``; ``greedy``.
    ``samples.json``: number of each sample to the fingerprint of its tokens.
    """
    tensors = {
        f"ranking.{axis}": value.double().contiguous() for axis, value in scores.ranking.items()
    }
    tensors |= _tensors(scores.calibration)
    if scores.greedy:
        tensors["greedy"] = torch.tensor(scores.greedy)
    save_file(tensors, folder / FILE)
    if scores.calibration.samples:
        write_json(
            folder / SAMPLES,
            {str(index): name for index, name in scores.calibration.samples.items()},
        )
    by_text = scores.calibration.by_text
    if by_text is not None:
        names = texts or [str(number) for number in range(len(by_text))]
        rows = zip(names, by_text.tolist(), strict=True)
        found = [_Text(text=name, tokens_of_experts=counts) for name, counts in rows]
        write_json(folder / ROUTING, {"texts": found})


def read_scores(folder: Path) -> Scores:
    """Reads what ``write_scores`` wrote.

    Raises:
        ValueError: a file is missing, damaged, or no longer what its artifact's manifest says.
    """
    path = folder / FILE
    check_file(path)
    tensors = read_tensors(path)
    ranking = {
        name.split(".", 1)[1]: value
        for name, value in tensors.items()
        if name.startswith("ranking.")
    }
    greedy = tuple(tensors["greedy"].flatten().tolist()) if "greedy" in tensors else ()
    samples = {}
    if (folder / SAMPLES).is_file():
        check_file(folder / SAMPLES)
        named = read_json(folder / SAMPLES, dict[str, str])
        samples = {int(index): name for index, name in named.items() if index.isdecimal()}
    by_text = read_routing(folder)[1] if (folder / ROUTING).is_file() else None
    try:
        return Scores(ranking, replace(_tally(tensors, samples), by_text=by_text), greedy)
    except (
        ValueError,
        KeyError,
        IndexError,
        RuntimeError,
        OverflowError,
    ):  # a name or number of another form
        raise ValueError(
            f"{path}: damaged: expected rankings and sums as they are written, found others; {remedy(path)}"
        ) from None


def read_routing(folder: Path) -> tuple[list[str], Tensor]:
    """Names of the texts, and the tokens that came to each expert of each, int64, [texts, layers, experts].

    Raises:
        ValueError: the file is missing, damaged, or no longer what its artifact's manifest says.
    """
    path = folder / ROUTING
    check_file(path)
    texts = read_json(path, _Routing)["texts"]
    try:
        counts = torch.tensor([text["tokens_of_experts"] for text in texts], dtype=torch.int64)
    except (ValueError, RuntimeError, OverflowError):
        counts = torch.zeros(0)
    if counts.dim() != 3 or not counts.numel() or counts.min() < 0:
        raise ValueError(
            f"{path}: damaged: expected for each text and layer one number per expert; {remedy(path)}"
        )
    return [text["text"] for text in texts], counts


def check_scores(folder: Path, scores: Scores, family: Family, sizes: Mapping[str, int]) -> None:
    """Refuses scores of another shape than a model's.

    Args:
        folder: where they lie.
        scores: what ``read_scores`` gave for it.
        family: the model's table.
        sizes: its axis sizes.

    Raises:
        ValueError: a ranking has other units, or a layer was removed twice, or is none.
    """
    path = folder / FILE
    for axis, ranking in scores.ranking.items():
        shape = score_shape(family, sizes, axis) if axis in family.axes else ()
        if tuple(ranking.shape) != shape or not ranking.is_floating_point():
            raise ValueError(
                f"{path}: damaged: ranking of {plain(axis, 40)}: expected numbers of shape {shape}, found "
                f"{tuple(ranking.shape)}; {remedy(path)}"
            )
    layers = sorted({*scores.greedy} & {*range(sizes["layers"])})
    if sorted(scores.greedy) != layers:
        raise ValueError(f"{path}: damaged: greedy: expected layers, each once; {remedy(path)}")


def _tensors(calibration: CalibrationSums) -> dict[str, Tensor]:
    tensors = {f"routed.{axis}": counts.contiguous() for axis, counts in calibration.routed.items()}
    for (axis, how), sums in calibration.sums.items():
        tensors[f"sums.{axis}.{how}.total"] = sums.total.contiguous()
        tensors[f"sums.{axis}.{how}.squares"] = sums.squares.contiguous()
        tensors[f"sums.{axis}.{how}.samples"] = torch.tensor(sums.samples)
    for (metric, length), depth in calibration.depth.items():
        tensors[f"depth.{metric}.{length}.total"] = depth.total.contiguous()
        tensors[f"depth.{metric}.{length}.base"] = torch.tensor(depth.base, dtype=torch.float64)
        tensors[f"depth.{metric}.{length}.count"] = torch.tensor(depth.count)
    return tensors


def _tally(tensors: Mapping[str, Tensor], samples: Mapping[int, str]) -> CalibrationSums:
    sums, routed, depth = {}, {}, {}
    for name, value in tensors.items():
        kind, *words = name.split(".")
        stem = name.rpartition(".")[0]
        if kind == "sums" and words[-1] == "samples":
            sums[words[0], words[1]] = Moments(
                int(value), tensors[f"{stem}.total"], tensors[f"{stem}.squares"]
            )
        elif kind == "routed":
            routed[words[0]] = value
        elif kind == "depth" and words[-1] == "count":
            base = float(tensors[f"{stem}.base"])
            depth[words[0], int(words[1])] = DepthSums(tensors[f"{stem}.total"], base, int(value))
    return CalibrationSums(sums, routed, depth, samples)
