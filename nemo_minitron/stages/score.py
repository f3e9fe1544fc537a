"""score: the importance of every channel, head, neuron, expert and layer ([P1] section 2.2)."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint, load_tensor, open_checkpoint
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.config.score_config import ScoreConfig
from nemo_minitron.data.mixtures import calibration_mixture, sampling, text_input, validation_text
from nemo_minitron.evaluation.held_out_tasks import is_made_here
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.select import score_shape
from nemo_minitron.pruning.target_sizes import HEAD_MERGE, explicit_targets, target_sizes
from nemo_minitron.scoring.activation_scores import (
    Outcome,
    Prepared,
    by_activation,
    prepare,
    scores_experts,
)
from nemo_minitron.scoring.batch_size import samples_at_once
from nemo_minitron.scoring.calibration_sums import CalibrationSums
from nemo_minitron.scoring.depth import block_importance
from nemo_minitron.scoring.importance import AGGREGATIONS, concentration, random_scores
from nemo_minitron.scoring.layer_removal import TaskSums, block_lengths, greedy_steps
from nemo_minitron.scoring.magnitude import magnitudes
from nemo_minitron.scoring.routing import effective_experts, routing_notes
from nemo_minitron.scoring.scores_file import Scores, read_scores, write_scores
from nemo_minitron.stages.inputs import length_notes, teacher_folder
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.workspace.condition import rebuilt_since
from nemo_minitron.workspace.layout import Workspace, plots_in
from nemo_minitron.workspace.manifest import SCHEMA, Input, read_manifest


def recipe(config: Config) -> Recipe:
    """Ranks the units of every axis of the teacher.

    Raises:
        ValueError: an unknown choice, or no (or too little) calibration text.
    """
    folder, item = teacher_folder(config)
    inputs, settings = [item], _settings(config, open_checkpoint(folder))
    activations = config.score.importance == "activation"
    if activations:
        inputs += _text_inputs(config)
    target = Workspace(workspace_of(config)).scores
    found: list[tuple[Prepared, CalibrationSums]] = []
    outcome: list[Outcome] = []

    def check() -> None:
        """Finds out what may be wrong with the text, and what is there already."""
        if activations:
            before = _earlier(target, config, item)
            found.append((prepare(config, folder, item), before))

    def build(state: Path, temporary: Path, ranks: Ranks) -> None:
        """Scores, and writes scores and pictures."""
        from nemo_minitron.scoring.distributed_pass import follow, leading

        if ranks.rank > 0:
            if activations:
                follow(ranks)
            return
        if activations:
            (prepared, before), tasks = found[0], _tasks(config, folder)
            with leading(ranks) as lead:
                outcome.append(by_activation(config, folder, prepared, state, before, lead, tasks))
            scores = outcome[0].scores
        else:
            scores = _BASELINES[config.score.importance](config, open_checkpoint(folder))
            if config.score.depth == "none":
                scores = Scores({n: s for n, s in scores.ranking.items() if n != "layers"})
        texts = _texts(config)
        scores = _with_routing(scores, len(texts))
        write_scores(temporary, scores, texts)
        _write_plots(plots_in(temporary), scores, texts)

    def summary() -> Summary:
        scored = _summary(config, read_scores(target), outcome)
        of = length_notes(config, read_config(folder), "calibration") if activations else ()
        return replace(scored, notes=(*scored.notes, *of))

    return Recipe(target, "scores", settings, inputs, build, summary, check, resumable=True)


def _texts(config: Config) -> list[str]:
    """Names of the texts whose tokens are counted apart: the paths, where they have weights."""
    calibration = config.data.calibration
    if calibration.weights is not None:
        return list(calibration.paths)
    return ["data.calibration" if calibration.paths else "data.train"]


def _with_routing(scores: Scores, texts: int) -> Scores:
    """The scores with tokens that came to each expert by text: of a single one, those of all."""
    found = scores.calibration
    if texts > 1 or "experts" not in found.routed:
        return scores
    return replace(scores, calibration=replace(found, by_text=found.routed["experts"][None]))


def _write_plots(folder: Path, scores: Scores, texts: list[str]) -> None:
    from nemo_minitron.evaluation.plots import depth_map, importance_maps, routing_map

    folder.mkdir()
    pictures = importance_maps(scores.ranking)
    measured = {
        name: block_importance(name[0], sums)
        for name, sums in scores.calibration.depth.items()
        if len(sums.total) > 1
    }
    if len(measured) > 1:  # of single layers alone the axis' own picture shows it
        pictures["depth"] = depth_map(measured)
    if scores.calibration.by_text is not None:
        pictures["routing"] = routing_map(texts, scores.calibration.by_text)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)


def _text_inputs(config: Config) -> list[Input]:
    """What a pass reads: the calibration text, and what tasks are made of."""
    texts = [text for text, _ in calibration_mixture(config)]
    if config.score.depth == "task" and any(map(is_made_here, config.score.tasks)):
        texts.append(validation_text(config))
    return [text_input(text) for text in texts]


def _tasks(config: Config, folder: Path) -> TaskSums:
    from nemo_minitron.evaluation.task_accuracy import task_sums

    return task_sums(config, open_checkpoint(folder))


def _settings(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """What decides the scores."""
    score = config.score
    settings: dict[str, Any] = {"importance": score.importance, "depth": score.depth}
    if score.importance == "random":
        settings["seed"] = score.seed
    if score.importance != "activation":
        _check_baseline(config)
        return settings
    _check(config, checkpoint)
    layers = checkpoint.architecture.sizes["layers"]
    calibration = config.data.calibration
    settings |= {
        "aggregation": asdict(score.aggregation),
        **_experts(config, checkpoint),
        "neurons": score.neurons,
        "blocks": list(block_lengths(config, layers)),
        "calibration": {
            **sampling(calibration),
            "packing": calibration.packing,
            "weights": calibration.weights,
        },
    }
    if score.depth == "task":
        if not score.tasks:
            raise ValueError(
                "score.depth=task: no task given; set score.tasks, as in score.tasks=[winogrande]"
            )
        from nemo_minitron.evaluation.task_files import task_print

        prints = {name: task_print(name, config.evaluate.task_dir) for name in score.tasks}
        settings["tasks"] = [list(score.tasks), score.task_limit, prints]
    if greedy_steps(config, layers):
        settings["greedy"] = greedy_steps(config, layers)
    if score.iterations > 1:
        asked = {k: v for k, v in explicit_targets(config.plan).items() if k != HEAD_MERGE}
        settings["iterations"] = [score.iterations, asked]
        # rounds once cut a width only where the sizes between had a divisor of both ends
        settings["sizes_between"] = "on the line"
    if score.shard:
        settings["shard"] = score.shard
    return settings


def _experts(config: Config, checkpoint: Checkpoint) -> dict[str, str]:
    """``score.experts`` where it decides something; ``all_tokens`` was the rule before there was a choice."""
    own = config.score.experts != "all_tokens" and scores_experts(checkpoint.architecture)
    return {"experts": config.score.experts} if own else {}


_OF_ACTIVATIONS = (
    "aggregation", "experts", "neurons", "blocks", "tasks", "iterations", "shard", "merge",
)  # fmt: skip
"""Keys of ``score`` that say what is read of activations, and how."""


def _check_baseline(config: Config) -> None:
    """Refuses what a ranking without a forward pass cannot honour; ``depth=none`` it can.

    Raises:
        ValueError: a choice that asks for activations.
    """
    score, plain = config.score, ScoreConfig()
    asked = [
        f"score.{name}" for name in _OF_ACTIVATIONS if getattr(score, name) != getattr(plain, name)
    ]
    if score.depth not in (plain.depth, "none"):
        asked.insert(0, f"score.depth={score.depth}")
    if config.plan.layer_choice == "greedy" and config.plan.layers is not None:
        asked.append("plan.layer_choice=greedy")
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: for forward passes over text, and score.importance={score.importance} "
            "makes none; leave it out, or score with score.importance=activation"
        )


def _check(config: Config, checkpoint: Checkpoint) -> None:
    """Refuses what cannot be, before anything is run.

    Raises:
        ValueError: an unknown aggregation, or choices that exclude each other.
    """
    score = config.score
    samples_at_once(score.batch_size)
    greedily = greedy_steps(config, checkpoint.architecture.sizes["layers"])
    if checkpoint.family.axes["layers"].fixed and (greedily or score.depth in ("lm_loss", "task")):
        asked = "plan.layer_choice=greedy" if greedily else f"score.depth={score.depth}"
        raise ValueError(
            f"{asked}: leaves layers out, and a layer of {checkpoint.family.model_type} may read what "
            "others made, so that all stay; use score.depth=block_influence or none, without plan.layers"
        )
    unknown = [how for how in score.aggregation.also if how not in AGGREGATIONS]
    if unknown:
        raise ValueError(
            f"score.aggregation.also: expected some of {', '.join(AGGREGATIONS)}, found {unknown[0]!r}"
        )
    if score.shard and (
        score.merge or score.iterations > 1 or config.plan.layer_choice == "greedy"
    ):
        raise ValueError(
            "score.shard: a part can neither be merged, nor be iterated, nor remove layers greedily: "
            "merge the parts first"
        )
    if score.merge and (
        score.iterations > 1 or score.depth == "task" or config.plan.layer_choice == "greedy"
    ):
        raise ValueError(
            "score.merge: adds up what was scored, and runs no model: not with iterations, tasks, greedy"
        )
    if score.depth == "task" and not score.tasks:
        raise ValueError(
            "score.depth=task: no task given; set score.tasks, as in score.tasks=[winogrande]"
        )
    if score.depth == "none" and greedily:
        raise ValueError(
            "plan.layer_choice=greedy: removes layers by what score.depth measures, and score.depth=none "
            "measures nothing; set score.depth=block_influence, lm_loss or task"
        )
    if score.iterations > 1:
        target_sizes(checkpoint.architecture, config.plan)


def _earlier(target: Path, config: Config, teacher: Input) -> CalibrationSums:
    """The sums of scores that are there already, of the same model read in the same way."""
    try:
        manifest = read_manifest(target)
    except ValueError:
        return CalibrationSums()
    if (
        manifest is None
        or manifest.schema != SCHEMA
        or manifest.config.get("importance") != "activation"
    ):
        return CalibrationSums()
    own = [item.fingerprint for item in manifest.inputs[:1]]
    rebuilt = teacher.finished and rebuilt_since(teacher.path, teacher.finished, manifest)
    if own != [teacher.fingerprint] or rebuilt or "iterations" in manifest.config:
        return CalibrationSums()
    same = manifest.config.get("neurons") == config.score.neurons
    calibration = manifest.config.get("calibration")
    packing = isinstance(calibration, dict) and (
        calibration.get("packing") == config.data.calibration.packing
    )
    try:
        return read_scores(target).calibration if same and packing else CalibrationSums()
    except ValueError:  # damaged: all is scored again
        return CalibrationSums()


def _by_magnitude(config: Config, checkpoint: Checkpoint) -> Scores:
    """L2 norm of each unit's weights, one tensor in memory at a time.

    A layer's score is the norm of all its weights.
    """
    entries = checkpoint.entries
    return Scores(magnitudes(checkpoint.architecture, entries, partial(load_tensor, checkpoint)))


def _by_chance(config: Config, checkpoint: Checkpoint) -> Scores:
    """Uniform random scores, a stream of its own per axis."""
    shapes = _shapes(checkpoint)
    seed = config.score.seed
    return Scores(
        {
            axis: random_scores(shape, seed * 1000 + i)
            for i, (axis, shape) in enumerate(shapes.items())
        }
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape of the scores of every axis that can be pruned."""
    family, sizes = checkpoint.family, checkpoint.architecture.sizes
    return {name: score_shape(family, sizes, name) for name in checkpoint.architecture.prunable}


_BASELINES = {"magnitude": _by_magnitude, "random": _by_chance}


def _summary(config: Config, scores: Scores, outcome: list[Outcome]) -> Summary:
    rows: list[tuple[str, ...]] = []
    facts: dict[str, Any] = {}
    for axis, ranking in scores.ranking.items():
        spread, extremes = concentration(ranking), _extremes(axis, ranking)
        facts[axis] = {"shape": list(ranking.shape), "concentration": spread, **extremes}
        rows.append((
            axis, " x ".join(map(str, ranking.shape)), f"{spread:.3f}",
            ", ".join(map(str, extremes.get("least", []))), ", ".join(map(str, extremes.get("most", []))),
        ))  # fmt: skip
    headline = f"{config.score.importance} importance of {len(rows)} axes"
    if scores.calibration.samples:
        headline += f" from {len(scores.calibration.samples):,} samples"
        facts["samples"] = len(scores.calibration.samples)
    if scores.greedy:
        facts["greedy"] = list(scores.greedy)
    notes: list[str] = []
    if outcome and outcome[0].tokens:
        speed = outcome[0].tokens / max(outcome[0].seconds, 1e-9)
        headline += (
            f", {outcome[0].tokens:,} tokens in {outcome[0].seconds:.1f} s ({speed:,.0f} tokens/s)"
        )
        facts["tokens_per_second"] = speed
    if outcome:
        notes = outcome[0].notes
    by_text = scores.calibration.by_text
    if by_text is not None:
        texts = _texts(config)
        facts["effective_experts"] = {
            name: effective_experts(counts) for name, counts in zip(texts, by_text, strict=True)
        }
        notes = [*notes, *routing_notes(texts, by_text)]
    return Summary(
        headline,
        ("axis", "scores", "concentration (Gini)", "least important", "most important"), tuple(rows), facts,
        tuple(notes),
    )  # fmt: skip


def _extremes(axis: str, ranking: Tensor) -> Mapping[str, list[int]]:
    """The least and most important units of an axis that has one ranking for the whole model."""
    if ranking.dim() > 1:
        return {}
    order = ranking.argsort(stable=True)
    return {"least": order[:3].tolist(), "most": order.flip(0)[:3].tolist()}
