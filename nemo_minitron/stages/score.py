"""score: the importance of every channel, head, neuron and layer ([P1] section 2.2).

All from one forward pass.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.artifacts.build import make
from nemo_minitron.artifacts.checkpoint import Checkpoint, open_checkpoint, tensor_reader
from nemo_minitron.artifacts.scores import Scores, read_scores, write_scores
from nemo_minitron.core.importance import AGGREGATIONS, concentration, over_batch, random_scores, unit_squares
from nemo_minitron.core.select import score_shape
from nemo_minitron.families import Family, axis_sizes, find_row, present_axes
from nemo_minitron.stages.config import Config
from nemo_minitron.stages.stage import (
    Result,
    calibration_text,
    sampling,
    teacher_folder,
    text_input,
    workspace_of,
)


def run(config: Config) -> Result:
    """Ranks the units of every axis of the teacher.

    Raises:
        ValueError: an unknown choice, or no (or too little) calibration text.
    """
    folder, item = teacher_folder(config)
    inputs = [item]
    score = config.score
    for name, how in (("batch", score.aggregation.batch), ("sequence", score.aggregation.sequence)):
        if how not in AGGREGATIONS:
            raise ValueError(
                f"score.aggregation.{name}: expected one of {', '.join(AGGREGATIONS)}, found {how!r}"
            )
    settings: dict[str, Any] = {"importance": score.importance, "depth": score.depth}
    if score.importance == "activation":
        inputs.append(text_input(calibration_text(config)))
        aggregation = {"batch": score.aggregation.batch, "sequence": score.aggregation.sequence}
        settings |= {"aggregation": aggregation, "calibration": sampling(config.data.calibration)}
    elif score.importance == "random":
        settings["seed"] = score.seed
    target = workspace_of(config) / "scores"
    compute = _METHODS[score.importance]
    started = time.monotonic()

    def build(temporary: Path) -> None:
        scores = compute(config, open_checkpoint(folder))
        write_scores(temporary, scores)
        from nemo_minitron.bridge.plots import importance_maps

        (temporary / "plots").mkdir()
        for name, picture in importance_maps(scores.ranking).items():
            (temporary / "plots" / f"{name}.png").write_bytes(picture)

    made = make(target, "scores", settings, inputs, build)
    seconds = time.monotonic() - started
    return _result(target, made, config, read_scores(target), seconds)


def _by_activation(config: Config, checkpoint: Checkpoint) -> Scores:
    """One pass over the calibration samples, through the decoder alone.

    No axis needs the output projection.
    """
    from rich.progress import track

    from nemo_minitron.bridge.models import decoder_of, frozen, load_model, load_tokenizer, pick_device
    from nemo_minitron.bridge.taps import Recorder
    from nemo_minitron.bridge.text import pack

    calibration = config.data.calibration
    tokens_NS = pack(
        calibration_text(config),
        load_tokenizer(checkpoint.folder),
        calibration.sequence_length,
        calibration.samples,
        calibration.seed,
        where="data.calibration",
    )[:, :-1]
    device = pick_device(config.score.device)
    model = load_model(checkpoint.folder, device=device)
    depth = config.score.depth == "block_influence"
    recorder = Recorder(checkpoint.family, checkpoint.config, config.score.aggregation.sequence, depth)
    decoder = decoder_of(model, checkpoint.family)
    batches = tokens_NS.split(config.score.batch_size)
    with frozen(model), recorder.attached(model):
        for tokens_BS in track(batches, description="scoring", transient=True):
            decoder(input_ids=tokens_BS.to(device), use_cache=False)
    ranking = {}
    for axis, sums in recorder.stacked().items():
        per_place = over_batch(sums, config.score.aggregation.batch)
        # one ranking for the model: the sum over all places where the axis is read
        ranking[axis] = per_place.sum(0) if checkpoint.family.axes[axis].scope == "model" else per_place
    if depth:
        cosines = torch.tensor([total / tokens for total, tokens in recorder.cosines], dtype=torch.float64)
        ranking["layers"] = 1 - cosines
    return Scores(ranking, recorder.stacked())


def _by_magnitude(config: Config, checkpoint: Checkpoint) -> Scores:
    """L2 norm of each unit's weights, one tensor in memory at a time.

    A layer's score is the norm of all its weights.
    """
    family, sizes = checkpoint.family, axis_sizes(checkpoint.family, checkpoint.config)
    squares = {axis: torch.zeros(shape, dtype=torch.float64) for axis, shape in _shapes(checkpoint).items()}
    read = tensor_reader(checkpoint)
    for name in checkpoint.entries:
        found = find_row(family, name)
        if found is None:
            continue
        row, units = found
        tensor = read(name)
        for axis, part in unit_squares(tensor, row, sizes, family, units).items():
            squares[axis][_place(family, axis, units)] += part
    return Scores({axis: total.sqrt() for axis, total in squares.items()}, {})


def _place(family: Family, axis: str, units: Mapping[str, int]) -> tuple[int, ...]:
    """Where a tensor's share of an axis' scores belongs: in its layer, in its expert, at its unit."""
    numbers = [units.get(family.axes[name].index or "") for name in (*family.ranked_per(axis), axis)]
    return tuple(number for number in numbers if number is not None)


def _by_chance(config: Config, checkpoint: Checkpoint) -> Scores:
    """Uniform random scores, a stream of its own per axis."""
    shapes = _shapes(checkpoint)
    seed = config.score.seed
    return Scores(
        {axis: random_scores(shape, seed * 1000 + i) for i, (axis, shape) in enumerate(shapes.items())}, {}
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape of the scores of every axis that can be pruned."""
    family, sizes = checkpoint.family, axis_sizes(checkpoint.family, checkpoint.config)
    present = present_axes(family, checkpoint.config)
    return {name: score_shape(family, sizes, name) for name in family.prunable if name in present}


_METHODS = {"activation": _by_activation, "magnitude": _by_magnitude, "random": _by_chance}


def _result(folder: Path, made: bool, config: Config, scores: Scores, seconds: float) -> Result:
    rows, facts = [], {}
    for axis, ranking in scores.ranking.items():
        spread = concentration(ranking)
        facts[axis] = {"shape": list(ranking.shape), "concentration": spread, **_extremes(axis, ranking)}
        extremes = _extremes(axis, ranking)
        rows.append((
            axis, " x ".join(map(str, ranking.shape)), f"{spread:.3f}",
            ", ".join(map(str, extremes.get("least", []))), ", ".join(map(str, extremes.get("most", []))),
        ))  # fmt: skip
    samples = config.data.calibration.samples
    headline = f"{config.score.importance} importance of {len(rows)} axes"
    if made and config.score.importance == "activation" and samples:
        tokens = samples * config.data.calibration.sequence_length
        headline += f", {tokens:,} tokens in {seconds:.1f} s"
    return Result(
        "score", folder, made, headline,
        ("axis", "scores", "concentration (Gini)", "least important", "most important"), tuple(rows), facts,
    )  # fmt: skip


def _extremes(axis: str, ranking: Tensor) -> Mapping[str, list[int]]:
    """The least and most important units of an axis that has one ranking for the whole model."""
    if ranking.dim() > 1:
        return {}
    order = ranking.argsort(stable=True)
    return {"least": order[:3].tolist(), "most": order.flip(0)[:3].tolist()}
