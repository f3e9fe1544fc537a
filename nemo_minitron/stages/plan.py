"""plan: from scores and target sizes to the units that stay."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.build import make
from nemo_minitron.artifacts.checkpoint import open_checkpoint
from nemo_minitron.artifacts.plan import Plan, make_plan, read_plan, write_plan
from nemo_minitron.artifacts.scores import Scores, read_scores
from nemo_minitron.artifacts.workspace import input_artifact
from nemo_minitron.core.select import complete_targets, kept_layers, scattered, select_units
from nemo_minitron.core.size import alignment
from nemo_minitron.families import Family, axis_sizes, check_layers, check_sizes, present_axes
from nemo_minitron.stages.config import Config, PlanConfig
from nemo_minitron.stages.stage import Result, teacher_folder, workspace_of


def run(config: Config) -> Result:
    """Decides which units stay.

    Raises:
        ValueError: a target is larger than the source, breaks a rule of the family, or nothing is asked for.
    """
    workspace = workspace_of(config)
    source, teacher = teacher_folder(config)
    checkpoint = open_checkpoint(source)
    sizes = axis_sizes(checkpoint.family, checkpoint.config)
    targets = target_sizes(checkpoint.family, checkpoint.config, config.plan)
    inputs = [teacher]
    if needs_scores(config.plan):
        inputs.append(input_artifact(workspace, "scores", "score"))

    def build(temporary: Path) -> None:
        scores = read_scores(workspace / "scores") if needs_scores(config.plan) else Scores({}, {})
        layers = _layers(config.plan, sizes, scores)
        check_layers(checkpoint.family, checkpoint.config, layers, "plan")
        widths = {axis: size for axis, size in targets.items() if axis != "layers"}
        keep = select_units(checkpoint.family, scores.ranking, sizes, widths)
        write_plan(temporary, make_plan(checkpoint.family, checkpoint.config, keep, tuple(layers)))

    made = make(workspace / "plan", "plan", given(config.plan), inputs, build)
    return _result(workspace / "plan", made, read_plan(workspace / "plan"))


def given(plan: PlanConfig) -> dict[str, Any]:
    """The keys of the plan that were set."""
    return {name: value for name, value in asdict(plan).items() if value is not None}


def needs_scores(plan: PlanConfig) -> bool:
    """Whether a ranking decides anything: a list of layers to drop alone needs none."""
    return bool(set(given(plan)) - {"drop_layers"})


def target_sizes(family: Family, config: Mapping[str, Any], plan: PlanConfig) -> dict[str, int]:
    """Target size of every axis.

    Raises:
        ValueError: a target that cannot be, with what was expected and found.
    """
    asked = {name: value for name, value in given(plan).items() if name != "drop_layers"}
    sizes, present = axis_sizes(family, config), present_axes(family, config)
    axes = [name for name in family.prunable if name in present]
    if not asked and not plan.drop_layers:
        options = ", ".join(f"plan.{name}" for name in axes)
        raise ValueError(f"plan: no target size given; set at least one of {options}, plan.drop_layers")
    for name in asked:
        if name not in axes:
            which = f"family {family.model_type!r}" if name not in family.prunable else "this model"
            raise ValueError(
                f"plan.{name}: {which} has no prunable axis of that name; it has {', '.join(axes)}"
            )
    targets = complete_targets(family, sizes, asked)
    if plan.drop_layers:
        targets["layers"] = sizes["layers"] - len(_checked_drop(plan, sizes["layers"]))
    check_sizes(family, targets, "plan")
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


def _layers(plan: PlanConfig, sizes: dict[str, int], scores: Scores) -> list[int]:
    if plan.drop_layers:
        return kept_layers(sizes["layers"], plan.drop_layers)
    if plan.layers is None or plan.layers == sizes["layers"]:
        return list(range(sizes["layers"]))
    if "layers" not in scores.ranking:
        raise ValueError("plan.layers: the scores rank no layers; run score with score.depth=block_influence")
    return kept_layers(sizes["layers"], scattered(scores.ranking["layers"], sizes["layers"] - plan.layers))


def _result(folder: Path, made: bool, plan: Plan) -> Result:
    rows = [(axis, f"{plan.before[axis]:,}", f"{plan.after[axis]:,}") for axis in plan.before]
    before, after = plan.cost_before, plan.cost_after
    for title, attribute in (
        ("parameters", "parameters"),
        ("without embeddings", "non_embedding"),
        ("active per token", "active"),
        (f"FLOPs per token at {before.context}", "flops_per_token"),
        ("KV-cache bytes per token", "kv_bytes_per_token"),
    ):
        rows.append((title, f"{getattr(before, attribute):,}", f"{getattr(after, attribute):,}"))
    share = after.parameters / before.parameters
    headline = f"{before.parameters:,} -> {after.parameters:,} parameters ({share:.1%})"
    if plan.layers_dropped:
        headline += f", layers {', '.join(map(str, plan.layers_dropped))} dropped"
    facts = {"before": asdict(before), "after": asdict(after), "layers_dropped": list(plan.layers_dropped)}
    notes = tuple(alignment(plan.before, plan.after))
    return Result("plan", folder, made, headline, ("", "before", "after"), tuple(rows), facts, notes)
