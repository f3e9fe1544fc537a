"""sensitivity: the loss (and tasks) against the kept share of each axis, and without each layer."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.evaluation.cut_losses import (
    FILE,
    PICTURE,
    Cutting,
    Sensitivity,
    price,
    read_sensitivity,
)
from nemo_minitron.families import check_sizes
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.scoring.scores_file import Scores
from nemo_minitron.stages.candidates import (
    measured_tasks,
    merging,
    screener_of,
    teacher_and_scores,
    write_tasks,
)
from nemo_minitron.stages.layer_choice import layers_of_plan
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.workspace.layout import Workspace, plots_in
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.progress_bar import bar

SHARES = (0.875, 0.75, 0.625, 0.5, 0.25)
"""Parts of an axis' units that are kept, as far as whole groups and the family's rules allow."""
Work = tuple[str, dict[str, int], tuple[int, ...]]
"""What is measured: an axis, or nothing, or a layer's number; the sizes; the layers kept."""


def recipe(config: Config) -> Recipe:
    """Measures the model as views of itself, one axis or one layer at a time.

    Under torchrun the ranks share the measurements.

    Raises:
        ValueError: no scores, or no held-out text.
    """
    folder, budget = Workspace(workspace_of(config)).sensitivity, config.plan.budget
    checkpoint, scores, inputs = teacher_and_scores(config)
    screener, inputs = screener_of(config, checkpoint, scores, inputs)
    settings = {
        "shares": list(SHARES), "tasks": measured_tasks(config), "task_limit": budget.task_limit,
        "samples": budget.screen_samples, "held_out": screener.key["held_out"],
        "layer_choice": config.plan.layer_choice, "depth": config.score.depth,
        **merging(config),
    }  # fmt: skip

    def build(_state: Path, temporary: Path, ranks: Ranks) -> None:
        work, left_out = _work(config, checkpoint, scores)
        write_tasks(config, screener.held_out, measured_tasks(config), ranks)
        mine = []
        with bar("cutting", -(-len(work) // ranks.size)) as advance:
            for number, (_, sizes, layers) in list(enumerate(work))[ranks.rank :: ranks.size]:
                mine.append((number, screener.measure(sizes, layers)))
                advance(1)
        found = dict(pair for each in ranks.gather(mine) for pair in each)
        if ranks.rank == 0:
            measured = [found[number] for number in range(len(work))]
            _write(temporary, checkpoint, work, measured, left_out)

    return Recipe(folder, "sensitivity", settings, inputs, build, lambda: _summary(folder))


def _work(
    config: Config, checkpoint: Checkpoint, scores: Scores
) -> tuple[list[Work], dict[str, str]]:
    """All that is measured, the whole model first, and the axes that cannot be cut alone."""
    model = checkpoint.architecture
    every = tuple(range(model.sizes["layers"]))
    work: list[Work] = [("", {}, every)]
    left_out: dict[str, str] = {}
    for axis in model.prunable:
        if axis != "layers" and model.family.axes[axis].follows is not None:
            continue
        own, why = [], "it has one unit"
        for size in _sizes(model, axis):
            try:
                own.append(_one(config, checkpoint, scores, axis, size))
            except ValueError as error:
                why = str(error)
        work += own
        if not own:
            left_out[axis] = why
    for layer in every if len(every) > 1 else ():
        rest = tuple(other for other in every if other != layer)
        try:
            model.check_layers(rest, "sensitivity")
            Cut(model, {}, rest).result.check_lists()
        except ValueError:
            continue
        work.append((str(layer), {}, rest))
    return work, left_out


def _sizes(model: Any, axis: str) -> Iterator[int]:
    unit = model.sizes.get(model.family.axes[axis].within or "", 1)
    size = model.sizes[axis] // unit
    found = {max(1, round(size * share)) * unit for share in SHARES}
    yield from sorted(found - {model.sizes[axis]}, reverse=True)


def _one(config: Config, checkpoint: Checkpoint, scores: Scores, axis: str, size: int) -> Work:
    """One axis at one size.

    Raises:
        ValueError: the family does not allow it alone, or the scores do not rank it.
    """
    model = checkpoint.architecture
    if axis == "layers":
        plan = replace(config.plan, layers=size)
        layers = layers_of_plan(replace(config, plan=plan), model.sizes, scores)
        model.check_layers(layers, "sensitivity")
        return axis, {}, tuple(layers)
    if axis not in scores.ranking and not any(
        other.within == axis and other.name in scores.ranking
        for other in model.family.axes.values()
    ):
        raise ValueError("the scores do not rank it")
    sizes = complete_targets(model.family, model.sizes, {axis: size}, "sensitivity")
    check_sizes(model.family, sizes, "sensitivity")
    return axis, {axis: size}, tuple(range(model.sizes["layers"]))


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    work: Sequence[Work],
    measured: Sequence[dict[str, Any]],
    left_out: dict[str, str],
) -> None:
    from nemo_minitron.evaluation.plots import sensitivity

    model = checkpoint.architecture
    whole = model_size(model).parameters
    axes, layers = [], {}
    for (name, sizes, kept), found in zip(work[1:], measured[1:], strict=True):
        if name.isdecimal():
            layers[name] = found["loss"]
            continue
        size = sizes[name] if sizes else len(kept)
        targets = complete_targets(model.family, model.sizes, sizes)
        smaller = Cut(model, {}, kept).result.resized({**targets, "layers": len(kept)})
        saved = 1 - model_size(smaller).parameters / whole
        axes.append(
            Cutting(name, size, size / model.sizes[name], saved, found["loss"], _metrics(found))
        )
    result = Sensitivity(measured[0]["loss"], _metrics(measured[0]), axes, layers, left_out)
    write_json(folder / FILE, asdict(result))
    plots_in(folder).mkdir()
    curves: dict[str, list[tuple[float, float]]] = {}
    for cut in axes:
        if cut.loss is not None:
            curves.setdefault(cut.axis, [(1.0, result.loss)]).append((cut.share, cut.loss))
    losses = [(int(layer), loss) for layer, loss in layers.items() if loss is not None]
    (plots_in(folder) / PICTURE).write_bytes(sensitivity(result.loss, curves, losses))


def _metrics(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: dict(task["metrics"]) for name, task in found["tasks"].items()}


def _summary(folder: Path) -> Summary:
    found = read_sensitivity(folder)
    rows = []
    for cut in sorted(found.axes, key=lambda cut: price(found, cut)):
        loss = "–" if cut.loss is None else f"{cut.loss:.4f}"
        rows.append((
            f"{cut.axis}={cut.size}", f"{cut.share:.0%}", f"{cut.parameters:.1%}", loss,
            f"{price(found, cut):+.4f}",
            *(_said(cut.tasks[name]) for name in found.tasks),
        ))  # fmt: skip
    order = sorted((loss, layer) for layer, loss in found.layers.items() if loss is not None)
    cheap = ", ".join(f"{layer} ({loss - found.loss:+.3f})" for loss, layer in order[:5])
    headline = f"held-out loss {found.loss:.4f} of the whole model" + (
        f"; least missed layers: {cheap}" if cheap else ""
    )
    columns = (
        "axis", "kept", "parameters saved", "held-out loss", "nats per 1 % saved", *found.tasks,
    )  # fmt: skip
    notes = tuple(f"{axis} is not cut alone: {why}" for axis, why in found.left_out.items())
    return Summary(headline, columns, tuple(rows), asdict(found), notes)


def _said(metrics: dict[str, float]) -> str:
    values = [f"{name} {value:.3f}" for name, value in metrics.items() if "_stderr" not in name]
    return ", ".join(values[:2])
