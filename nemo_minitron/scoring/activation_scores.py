"""Scores from activations: which samples, which sums, in memory or layer by layer, on one rank or many."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import calibration_mixture
from nemo_minitron.families import CHOSEN_EXPERTS, Architecture
from nemo_minitron.pruning.select import Keep, select_units
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.scoring.calibration_sums import CalibrationSums, merge_sums, rankings
from nemo_minitron.scoring.importance import OWN_TOKENS
from nemo_minitron.scoring.iterative import outranked, sizes_after, spread
from nemo_minitron.scoring.layer_removal import (
    TaskSums,
    block_lengths,
    greedy,
    greedy_steps,
    with_tasks,
)
from nemo_minitron.scoring.pass_runner import Runner
from nemo_minitron.scoring.scores_file import Scores, read_scores
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import Input, read_manifest

if TYPE_CHECKING:
    from nemo_minitron.data.calibration_samples import Samples
    from nemo_minitron.scoring.distributed_pass import Leader
    from nemo_minitron.scoring.hooks import Measures


@dataclass
class Outcome:
    """Result of scoring, and its speed.

    Attributes:
        scores: the result.
        tokens: tokens that were read, of all ranks and rounds; 0 where everything was there
            already.
        seconds: how long that took.
        notes: what was chosen on the way, one line each.
    """

    scores: Scores
    tokens: int
    seconds: float
    notes: list[str]


def measures_of(config: Config, model: Architecture, texts: int = 1) -> "Measures":
    """What the passes of a configuration sum over samples of so many texts."""
    from nemo_minitron.scoring.hooks import Measures

    lengths, routed = block_lengths(config, model.sizes["layers"]), scores_experts(model)
    depth = config.score.depth
    aggregation = config.score.aggregation
    return Measures(
        tuple(dict.fromkeys((aggregation.sequence, *aggregation.also))),
        config.score.neurons == "pre_activation",
        lengths if depth == "block_influence" else (),
        lengths if depth == "lm_loss" else (),
        routed and config.score.experts == OWN_TOKENS,
        texts if routed and texts > 1 else 0,
    )


def scores_experts(model: Architecture) -> bool:
    """Whether a model has routed experts that are seen while it is scored."""
    return "experts" in model.present and "experts" in model.family.taps


@dataclass(frozen=True)
class Prepared:
    """Everything that is read before the first pass.

    Attributes:
        samples: the calibration samples.
        wanted: number to fingerprint of those that this run is to score.
        measures: what to sum.
        merged: the sums of ``score.merge``; empty where nothing is merged.
    """

    samples: "Samples"
    wanted: dict[int, str]
    measures: "Measures"
    merged: CalibrationSums


def prepare(config: Config, folder: Path, teacher: Input) -> Prepared:
    """Reads the calibration text, and the parts that are to be merged.

    Args:
        config: the whole configuration.
        folder: the model.
        teacher: the model as an artifact's input.

    Raises:
        ValueError: too little text, or parts that do not make a whole.
    """
    from nemo_minitron.data.calibration_samples import calibration_samples
    from nemo_minitron.models.causal_lm import load_tokenizer

    checkpoint, calibration = open_checkpoint(folder), config.data.calibration
    mixture = calibration_mixture(config)
    samples = calibration_samples(
        mixture, load_tokenizer(folder), calibration.sequence_length, calibration.samples,
        calibration.seed, calibration.packing,
    )  # fmt: skip
    named = dict(enumerate(samples.fingerprints()))
    wanted = {index: named[index] for index in part_of(config.score.shard, len(samples))}
    measures = measures_of(config, checkpoint.architecture, len(mixture))
    merged = _merged(config, teacher, measures, wanted) if config.score.merge else CalibrationSums()
    return Prepared(samples, wanted, measures, merged)


def by_activation(
    config: Config,
    folder: Path,
    prepared: Prepared,
    state: Path,
    before: CalibrationSums,
    lead: "Leader",
    tasks: TaskSums,
) -> Outcome:
    """Scores a model on the calibration samples.

    Args:
        config: the whole configuration.
        folder: the model.
        prepared: what ``prepare`` gave.
        state: folder that survives interruption.
        before: sums of an earlier scoring of this model, which count as far as they fit.
        lead: runs passes on all ranks.
        tasks: measures tasks without blocks of layers.
    """
    from nemo_minitron.scoring.distributed_pass import load_partial, save_partial

    checkpoint, wanted, measures = open_checkpoint(folder), prepared.wanted, prepared.measures
    if prepared.merged.samples:
        return Outcome(_scores(config, checkpoint, prepared.merged), 0, 0.0, [])
    known = usable(load_partial(state), measures, wanted)
    known = known if known.samples else usable(before, measures, wanted)
    missing = [index for index in wanted if index not in known.samples]
    notes = (
        [f"{len(known.samples)} of {len(wanted)} samples were scored before"]
        if known.samples
        else []
    )
    run = Runner(config, lead, prepared.samples, state, notes)
    calibration = known
    if missing:
        save_partial(state, known)
        calibration = merge_sums(known, run(folder, measures, missing))
        save_partial(state, calibration)
    scores = _scores(config, checkpoint, calibration)
    if config.score.depth == "task":
        scores = with_tasks(config, lead, checkpoint, scores, tasks)
    steps = greedy_steps(config, checkpoint.architecture.sizes["layers"])
    if steps:
        order = greedy(config, run, checkpoint, scores, list(wanted), steps, tasks)
        scores = replace(scores, greedy=order)
    if config.score.iterations > 1:
        scores = _iterated(config, run, checkpoint, scores, measures, list(wanted))
    return Outcome(scores, run.tokens, run.seconds, notes)


def part_of(shard: str | None, count: int) -> list[int]:
    """Numbers of the samples of part i of n: every n-th, from the i-th.

    Raises:
        ValueError: not of the form i/n, or out of range.
    """
    if shard is None:
        return list(range(count))
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"score.shard: expected i/n with 1 <= i <= n, as in 2/4, found {shard!r}")
    if int(match[2]) > count:
        raise ValueError(f"score.shard: {count} samples cannot be split into {match[2]} parts")
    return list(range(int(match[1]) - 1, count, int(match[2])))


def usable(
    calibration: CalibrationSums, measures: "Measures", wanted: dict[int, str]
) -> CalibrationSums:
    """Saved sums that can be reused; empty if they lack something or hold too much."""
    if any(wanted.get(index) != name for index, name in calibration.samples.items()):
        return CalibrationSums()
    depth = [("block_influence", n) for n in measures.influence] + [
        ("lm_loss", n) for n in measures.losses
    ]
    held = {how for _, how in calibration.sums}
    hows = {*measures.sequence, *([OWN_TOKENS] if measures.own_tokens else [])}
    if not hows <= held or not set(depth) <= set(calibration.depth):
        return CalibrationSums()
    sums = {key: value for key, value in calibration.sums.items() if key[1] in hows}
    by_text = calibration.by_text
    if by_text is not None and len(by_text) != measures.texts:  # of another mixture
        by_text = None
    kept = {key: calibration.depth[key] for key in depth}
    return replace(calibration, sums=sums, depth=kept, by_text=by_text)


def _merged(
    config: Config, teacher: Input, measures: "Measures", wanted: dict[int, str]
) -> CalibrationSums:
    """Adds up the parts that other runs scored."""
    found = CalibrationSums()
    for name in config.score.merge:
        place = Workspace(Path(name).expanduser()).scores
        manifest = read_manifest(place)
        if manifest is None or manifest.config.get("importance") != "activation":
            raise ValueError(f"score.merge: {place}: no scores from activations there")
        if [item.fingerprint for item in manifest.inputs[:1]] != [teacher.fingerprint]:
            raise ValueError(f"score.merge: {place}: scores of another model")
        if manifest.config.get("neurons") != config.score.neurons:
            raise ValueError(
                f"score.merge: {place}: neurons were read elsewhere ({manifest.config.get('neurons')})"
            )
        part = read_scores(place).calibration
        fitting = usable(part, measures, wanted)
        if not fitting.samples:
            raise ValueError(
                f"score.merge: {place}: not the samples, aggregations and blocks that are asked for here"
            )
        try:
            found = merge_sums(found, fitting)
        except (ValueError, RuntimeError) as error:  # sums of other shapes
            raise ValueError(f"score.merge: {place}: {error}") from error
    missing = [index for index in wanted if index not in found.samples]
    if missing:
        raise ValueError(
            f"score.merge: the parts hold {len(found.samples)} of {len(wanted)} samples; "
            f"number {missing[0]} is the first that is missing"
        )
    return found


def _scores(config: Config, checkpoint: Checkpoint, calibration: CalibrationSums) -> Scores:
    aggregation = config.score.aggregation
    ranking = rankings(
        calibration, checkpoint.family, aggregation.batch, aggregation.sequence, config.score.depth,
        config.score.experts,
    )  # fmt: skip
    return Scores(ranking, calibration)


def _iterated(
    config: Config,
    run: Runner,
    checkpoint: Checkpoint,
    scores: Scores,
    measures: "Measures",
    indices: list[int],
) -> Scores:
    """Iterative importance: cuts a part of the way, scores what is left, T rounds in all."""
    from nemo_minitron.pruning.target_sizes import target_sizes
    from nemo_minitron.workspace.build import building, discard

    family, sizes = checkpoint.family, checkpoint.architecture.sizes
    target = target_sizes(checkpoint.architecture, config.plan)
    rounds = config.score.iterations
    ranking = dict(scores.ranking)
    every = tuple(range(sizes["layers"]))
    for round_ in range(rounds - 1):
        between = sizes_after(family, sizes, target, round_, rounds)
        widths = {axis: size for axis, size in between.items() if axis != "layers"}
        keep: Keep = select_units(family, ranking, sizes, widths)
        folder = run.state / f"narrowed-{round_}"
        with building(folder) as temporary:
            write_pruned(
                checkpoint,
                [
                    (
                        temporary,
                        Cut(checkpoint.architecture, keep, every, between.get(CHOSEN_EXPERTS)),
                    )
                ],
                5_000_000_000,
            )
        calibration = run(folder, replace(measures, influence=(), losses=()), indices, save=False)
        found = rankings(
            calibration,
            family,
            config.score.aggregation.batch,
            config.score.aggregation.sequence,
            "none",
            config.score.experts,
        )
        for axis, values in found.items():
            now, alive = spread(family, sizes, keep, axis, values)
            ranking[axis] = outranked(ranking[axis], now, alive)
        discard(folder)
    return Scores(ranking, replace(scores.calibration, sums={}), scores.greedy)
