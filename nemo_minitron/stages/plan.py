"""plan: from scores and target sizes to the units that stay."""

from dataclasses import asdict, replace
from pathlib import Path

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.cost import alignment
from nemo_minitron.pruning.plan_file import Plan, make_plan, mtp_note, read_plan, write_plan
from nemo_minitron.pruning.select import Keep, select_units
from nemo_minitron.pruning.serving import serving_notes
from nemo_minitron.pruning.slice import Cut, pattern_notes
from nemo_minitron.pruning.target_sizes import explicit_targets, needs_scores, target_sizes
from nemo_minitron.scoring.scores_file import Scores, check_scores, read_scores
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.layer_choice import layers_of_plan
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace


def recipe(config: Config) -> Recipe:
    """Decides which units stay.

    Raises:
        ValueError: a target is larger than the source, breaks a rule of the family, or nothing is
            asked for.
    """
    workspace = Workspace(workspace_of(config))
    source, teacher = teacher_folder(config)
    checkpoint = open_checkpoint(source)
    sizes = checkpoint.architecture.sizes
    targets = target_sizes(checkpoint.architecture, config.plan)
    if config.plan.mtp == "keep" and checkpoint.predictions:
        raise ValueError(
            f"plan.mtp=keep: {source}: the {len(checkpoint.predictions)} tensors of prediction layers, as "
            f"{plain(checkpoint.predictions[0], 120)}, cannot be cut along: no table of "
            f"{checkpoint.family.model_type} describes them; use drop"
        )
    inputs = [teacher]
    if needs_scores(config.plan):
        inputs.append(input_artifact(workspace.root, "scores", "score"))

    def build(_state: Path, temporary: Path, _ranks: Ranks) -> None:
        from nemo_minitron.models.config_trial import check_config_loads

        scores = Scores({})
        if needs_scores(config.plan):
            scores = read_scores(workspace.scores)
            check_scores(workspace.scores, scores, checkpoint.family, sizes)
        layers = layers_of_plan(config, sizes, scores)
        checkpoint.architecture.check_layers(layers, "plan")
        widths = {axis: size for axis, size in targets.items() if axis != "layers"}
        keep = select_units(checkpoint.family, scores.ranking, sizes, widths)
        result = Cut(checkpoint.architecture, keep, tuple(layers)).result
        check_config_loads(both_spellings(result.config), "plan")
        write_plan(temporary, _made(checkpoint, keep, tuple(layers)))

    settings = explicit_targets(config.plan)
    if settings.get("layer_choice") == "contiguous":
        settings["depth"] = config.score.depth
    folder = workspace.plan

    def summary() -> Summary:
        plan = read_plan(folder)
        of = pattern_notes(checkpoint.architecture, plan.layers_kept)
        of += serving_notes(checkpoint.architecture, plan.after, config.plan.serve)
        found = _summary(plan)
        return replace(found, notes=(*found.notes, *of))

    return Recipe(folder, "plan", settings, inputs, build, summary)


def _made(checkpoint: Checkpoint, keep: Keep, layers: tuple[int, ...]) -> Plan:
    return make_plan(checkpoint.architecture, keep, layers, mtp_note(checkpoint))


def _summary(plan: Plan) -> Summary:
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
    facts = {
        "before": asdict(before),
        "after": asdict(after),
        "layers_dropped": list(plan.layers_dropped),
    }
    notes = (*alignment(plan.before, plan.after), *([plan.mtp] if plan.mtp else []))
    return Summary(headline, ("", "before", "after"), tuple(rows), facts, notes)
