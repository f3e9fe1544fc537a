"""All sums of a scoring pass. Batches, ranks, machines and resumed runs add them up.

Dimension 0 of every sum is the layer, whichever layers a pass saw.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_minitron.families import Family
from nemo_minitron.scoring.depth import DepthSums, block_importance, merge_depth
from nemo_minitron.scoring.importance import OWN_TOKENS, Moments, merge, over_batch, own_mean


@dataclass(frozen=True)
class CalibrationSums:
    """Sums over a set of calibration samples.

    Attributes:
        sums: (axis, sequence aggregation) to moments: [layers, taps, units] for the axes ranked
            once for the model, [layers, units] or [layers, experts, units] for the others; zero in
            layers without it.
        routed: axis name to tokens that came to each of its units, int64, [layers, units]
            (experts).
        depth: (metric, block length) to its sums.
        samples: number of each calibration sample to the fingerprint of its tokens.
        by_text: tokens that came to each expert, for each text of a mixture, int64, [texts, layers,
            experts]; None where they were not counted apart.
    """

    sums: Mapping[tuple[str, str], Moments] = field(default_factory=dict)
    routed: Mapping[str, Tensor] = field(default_factory=dict)
    depth: Mapping[tuple[str, int], DepthSums] = field(default_factory=dict)
    samples: Mapping[int, str] = field(default_factory=dict)
    by_text: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing has been summed."""
        return not self.samples


def merge_sums(left: CalibrationSums, right: CalibrationSums) -> CalibrationSums:
    """Sums over two disjoint sets of samples together.

    Raises:
        ValueError: they share a sample, or do not hold the same sums.
    """
    if left.empty or right.empty:
        return right if left.empty else left
    both = set(left.samples) & set(right.samples)
    if both:
        raise ValueError(
            f"scores to be merged share calibration sample {min(both)}: it would count twice"
        )
    if set(left.sums) != set(right.sums) or set(left.depth) != set(right.depth):
        raise ValueError("scores to be merged hold different axes, aggregations or depth metrics")
    return CalibrationSums(
        {key: merge(value, right.sums[key]) for key, value in left.sums.items()},
        {axis: value + right.routed[axis] for axis, value in left.routed.items()},
        {key: merge_depth(value, right.depth[key]) for key, value in left.depth.items()},
        {**left.samples, **right.samples},
        # of a part of the samples alone it would be taken for that of all
        None if left.by_text is None or right.by_text is None else left.by_text + right.by_text,
    )


def rankings(
    calibration: CalibrationSums,
    family: Family,
    batch: str,
    sequence: str,
    depth: str,
    experts: str = "all_tokens",
) -> dict[str, Tensor]:
    """Scores of every axis from the sums.

    Args:
        calibration: the sums.
        family: the model's table.
        batch: aggregation over samples.
        sequence: aggregation over positions; one that was summed.
        depth: metric that ranks the layers, or ``none``.
        experts: ``all_tokens``: the two aggregations, as for every axis; ``own_tokens``: the mean
            over the tokens that came to the expert, where it was summed.

    Returns:
        Axis name to scores, float64; axes of scope ``model`` have one ranking, the sum over all
        places where the axis is read ([P1] section 2.2), the others one per layer (and expert).
    """
    ranking = {}
    for (axis, how), sums in calibration.sums.items():
        if how == sequence:
            scores = over_batch(sums, batch)
            ranking[axis] = scores.sum((0, 1)) if family.axes[axis].scope == "model" else scores
    own = calibration.sums.get(("experts", OWN_TOKENS))
    if experts == OWN_TOKENS and own is not None:
        ranking["experts"] = own_mean(own, calibration.routed["experts"])
    if (depth, 1) in calibration.depth:
        ranking["layers"] = block_importance(depth, calibration.depth[depth, 1])
    return ranking


def place(sums: Moments, layer: int, layers: int) -> Moments:
    """Puts one layer's moments, of shape [1, ...], at their place among all layers."""
    total = torch.zeros(layers, *sums.total.shape[1:], dtype=sums.total.dtype)
    squares = torch.zeros_like(total)
    total[layer], squares[layer] = sums.total[0], sums.squares[0]
    return Moments(sums.samples, total, squares)
