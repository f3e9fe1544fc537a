"""What stands first in a sorted model is what a plan keeps."""

import pytest
import torch

from nemo_minitron.families import architecture_of, families
from nemo_minitron.proofs.proof import TOGETHER, halved
from nemo_minitron.proofs.tiny_models import tiny_config
from nemo_minitron.pruning.select import complete_targets, score_shape, select_units
from nemo_minitron.pruning.sorted_units import beginnings, importance_order


@pytest.mark.parametrize("name", sorted(families()))
def test_the_first_units_of_the_order_are_those_that_a_plan_keeps(name):
    family = families()[name]
    for changes in family.proofs:
        model = architecture_of(tiny_config(family, changes))
        sizes, axes = model.sizes, model.prunable
        draw = torch.Generator().manual_seed(3)
        scores = {  # few values, so that there are ties
            axis: torch.randint(
                0, 5, score_shape(model.family, sizes, axis), generator=draw
            ).double()
            for axis in axes
        }
        order = importance_order(model.family, scores, sizes)
        for axis, index in order.items():
            every = torch.arange(sizes[axis]).expand(index.shape)
            assert torch.equal(index.sort(-1).values, every), axis
        for axis in [*axes, TOGETHER]:
            if axis == "layers":
                continue
            targets = {**halved(model.family, sizes, axis, axes), "layers": sizes["layers"]}
            kept = select_units(
                model.family, scores, sizes, {n: t for n, t in targets.items() if n != "layers"}
            )
            found = beginnings(model.family, order, sizes, targets)
            assert kept.keys() == found.keys()
            for each, index in kept.items():
                first = order[each][..., found[each]]
                assert torch.equal(first.sort(-1).values, index), (changes, axis, each)


def test_an_axis_that_the_scores_do_not_rank_is_not_cut():
    family = families()["llama"]
    model = architecture_of(tiny_config(family, {}))
    scores = {"ffn": torch.rand(model.sizes["layers"], model.sizes["ffn"])}
    order = importance_order(model.family, scores, model.sizes)
    targets = complete_targets(model.family, model.sizes, {"hidden": 16})
    with pytest.raises(ValueError, match="hold no ranking for axis 'hidden'; they order ffn"):
        beginnings(model.family, order, model.sizes, targets)
    with pytest.raises(ValueError, match="NaN or infinity"):
        importance_order(model.family, {"ffn": scores["ffn"] * torch.nan}, model.sizes)
