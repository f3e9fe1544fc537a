"""NumPy: what a pass through a model takes, from a table of what each kind of layer takes by its sizes."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.families import Architecture
from nemo_minitron.pruning.size_space import Latency
from nemo_minitron.workspace.typed_json import read_json

FILE = "layer_times.json"


@dataclass(frozen=True)
class Kind:
    """Times of one kind of layer.

    Attributes:
        axes: whose sizes were varied.
        sizes: the sizes of each, ascending, two or more.
        ms: milliseconds of one layer for every combination, the last axis fastest.
    """

    axes: list[str]
    sizes: list[list[int]]
    ms: list[float]


@dataclass(frozen=True)
class LayerTimes:
    """What a machine takes for the layers of a model.

    Attributes:
        machine, torch: the device by its name, and the software.
        model_type, before: the family and the sizes of the model whose layers were measured.
        dtype: of weights and activations.
        phase, batch, context: the pass, as in ``plan.budget``.
        kinds: one for each kind of layer.
        kind_of: number of each layer's kind.
        outside: embedding, final norm and head.
    """

    machine: str
    torch: str
    model_type: str
    before: dict[str, int]
    dtype: str
    phase: str
    batch: int
    context: int
    kinds: list[Kind]
    kind_of: list[int]
    outside: Kind


def read_layer_times(path: Path) -> LayerTimes:
    """Reads a table.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(
            f"plan.budget.layer_times: no such file: {path}; 'minitron measure-layers' writes one"
        )
    found: LayerTimes = read_json(path, LayerTimes)
    for kind in [*found.kinds, found.outside]:
        count = math.prod(len(sizes) for sizes in kind.sizes)
        rising = all(a < b for sizes in kind.sizes for a, b in itertools.pairwise(sizes))
        if count != len(kind.ms) or len(kind.axes) != len(kind.sizes) or not rising:
            raise ValueError(
                f"{path}: damaged: expected {count} times for ascending sizes of {kind.axes}, found "
                f"{len(kind.ms)}"
            )
    if any(not 0 <= kind < len(found.kinds) for kind in found.kind_of):
        raise ValueError(f"{path}: damaged: kind_of names kinds that are not there")
    return found


def latency_of(times: LayerTimes, model: Architecture) -> Latency:
    """What a pass takes, in milliseconds, as a function of kept layers and sizes.

    Raises:
        ValueError: the table is of another model.
    """
    if times.model_type != model.family.model_type or times.before != model.sizes:
        raise ValueError(
            f"plan.budget.layer_times: the table is of a {times.model_type} of other sizes than this "
            f"{model.family.model_type}; run 'minitron measure-layers' for this model"
        )

    def latency(layers: Sequence[int], sizes: Mapping[str, Any]) -> Any:
        total = _interpolated(times.outside, sizes)
        for kind, count in Counter(times.kind_of[layer] for layer in layers).items():
            total = total + count * _interpolated(times.kinds[kind], sizes)
        return total

    return latency


def _interpolated(kind: Kind, sizes: Mapping[str, Any]) -> Any:
    """Multilinear between the measured sizes, and on beyond them; never below zero."""
    table = np.array(kind.ms).reshape([len(each) for each in kind.sizes])
    lower, part = [], []
    for axis, known in zip(kind.axes, kind.sizes, strict=True):
        points = np.array(known, dtype=np.float64)
        at = np.asarray(sizes[axis], dtype=np.float64)
        index = np.clip(np.searchsorted(points, at, side="right") - 1, 0, len(points) - 2)
        lower.append(index)
        part.append((at - points[index]) / (points[index + 1] - points[index]))
    total: Any = 0.0 if kind.axes else table
    for corner in itertools.product((0, 1), repeat=len(kind.axes)) if kind.axes else ():
        weight: Any = 1.0
        for side, share in zip(corner, part, strict=True):
            weight = weight * (share if side else 1 - share)
        places = tuple(index + side for index, side in zip(lower, corner, strict=True))
        total = total + weight * table[places]
    return np.maximum(total, 0.0)
