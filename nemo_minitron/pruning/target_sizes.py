"""Target sizes of a plan, checked against the model before anything is scored or cut."""

from dataclasses import asdict
from typing import Any

from nemo_minitron.config.plan_config import PlanConfig
from nemo_minitron.families import CHOSEN_EXPERTS, Architecture, check_sizes
from nemo_minitron.pruning.budget import asks_for_search
from nemo_minitron.pruning.head_merge import check_head_merge
from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.pruning.serving import check_serving

HEAD_MERGE = "head_merge"
NOT_OF_A_SIZE = ("layer_choice", "mtp", HEAD_MERGE)
"""Keys that may stand beside a search, or the sizes of a cascade: they say how each of them is cut."""
_CHOICES = ("drop_layers", *NOT_OF_A_SIZE)
"""Keys of the plan that are no sizes."""
_VOCABULARY = ("vocab", "vocab_coverage")
"""Keys that ask for a vocabulary, whose entries a text decides on, no score."""


_SEARCH = ("budget", "serve")
"""Keys of the plan that say which sizes are wanted, and are none."""


def explicit_targets(plan: PlanConfig) -> dict[str, Any]:
    """The keys of the plan that were set."""
    return {
        name: value
        for name, value in asdict(plan).items()
        if value is not None and name not in _SEARCH and (name, value) != (HEAD_MERGE, "none")
    }


def needs_scores(plan: PlanConfig) -> bool:
    """Whether the plan needs scores.

    A list of layers to drop, a vocabulary, and fewer experts for a token do not.
    """
    return bool(set(explicit_targets(plan)) - {*_CHOICES, *_VOCABULARY, CHOSEN_EXPERTS})


def cuts_vocabulary(plan: PlanConfig) -> bool:
    """Whether the plan asks for a vocabulary."""
    return bool(set(explicit_targets(plan)) & set(_VOCABULARY))


def target_sizes(model: Architecture, plan: PlanConfig) -> dict[str, int]:
    """Target size of every axis; that of the vocabulary, which a text decides on, is the model's own.

    Raises:
        ValueError: a target that cannot be, with what was expected and found.
    """
    others = {*_CHOICES, *_VOCABULARY}
    asked = {name: value for name, value in explicit_targets(plan).items() if name not in others}
    family, sizes, axes = model.family, model.sizes, model.settable
    if (bound := asks_for_search(plan.budget)) is not None:
        raise ValueError(
            f"plan.budget.{bound}: asks for a search, which 'minitron run' makes; this stage wants sizes"
        )
    if plan.vocab is not None and plan.vocab_coverage is not None:
        raise ValueError("plan.vocab and plan.vocab_coverage: give one of them, not both")
    if not asked and not plan.drop_layers and not cuts_vocabulary(plan):
        options = ", ".join(f"plan.{name}" for name in model.resizable)
        raise ValueError(
            f"plan: no target size given; set at least one of {options}, plan.drop_layers"
        )
    keys = {name: name for name in asked} | ({"layers": "drop_layers"} if plan.drop_layers else {})
    for name, key in keys.items():
        if name not in axes:
            known = (*family.prunable, CHOSEN_EXPERTS)
            which = f"family {family.model_type!r}" if name not in known else "this model"
            raise ValueError(
                f"plan.{key}: {which} has no prunable axis of that name; it has {', '.join(axes)}"
            )
    targets = complete_targets(family, sizes, asked)
    if plan.drop_layers:
        targets["layers"] = sizes["layers"] - len(_checked_drop(plan, sizes["layers"]))
    check_sizes(family, targets, "plan")
    check_serving(model, targets, plan.serve, "plan.serve")
    check_head_merge(model, targets, plan.head_merge)
    return targets


def _checked_drop(plan: PlanConfig, layers: int) -> list[int]:
    dropped = list(plan.drop_layers or [])
    if plan.layers is not None:
        raise ValueError("plan.layers and plan.drop_layers: give one of them, not both")
    wrong = [layer for layer in dropped if not 0 <= layer < layers]
    if wrong or len(set(dropped)) != len(dropped) or len(dropped) >= layers:
        raise ValueError(
            f"plan.drop_layers: expected different layers of 0 to {layers - 1}, not all, found {dropped}"
        )
    return dropped
