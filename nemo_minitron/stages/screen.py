"""screen: which of all sizes within a budget are worth a distillation, measured in memory as they are cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.config.plan_config import BudgetConfig
from nemo_minitron.evaluation.screening import (
    FILE,
    Screen,
    Screened,
    Screener,
    read_screen,
    screened,
)
from nemo_minitron.families import CHOSEN_EXPERTS, VOCAB
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.budget import Limits, asks_for_search, limits_of, needs_latency, share_of
from nemo_minitron.pruning.head_merge import check_head_merge_of_search
from nemo_minitron.pruning.layer_times import LayerTimes, latency_of
from nemo_minitron.pruning.serving import served
from nemo_minitron.pruning.shortlist import pool, promising, shares, spread, varied
from nemo_minitron.pruning.size_search import checked_choices, default_choices, whole_choices
from nemo_minitron.pruning.size_space import (
    MOST,
    Space,
    Terms,
    front,
    size_space,
    source_costs,
    within,
)
from nemo_minitron.pruning.slice_predictions import keeps_predictions
from nemo_minitron.pruning.target_sizes import NOT_OF_A_SIZE, explicit_targets
from nemo_minitron.scoring.scores_file import Scores
from nemo_minitron.stages.candidates import (
    measured_tasks,
    merging,
    screener_of,
    teacher_and_scores,
    write_tasks,
)
from nemo_minitron.stages.inputs import teacher_folder, times_of
from nemo_minitron.stages.layer_choice import check_depths, layers_of_plan
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.progress_bar import bar

_DECIDE_NOTHING = ("steps", "factor", "continued", "layer_times")
"""Keys of the budget that say how candidates are distilled, or where a file lies."""
_WIDER = (1.0, 0.7, 0.5, 0.3)
"""What the share is multiplied by, one after the other, until a default grid reaches the budget."""


def recipe(config: Config) -> Recipe:
    """Measures a shortlist of the sizes within ``plan.budget``.

    Under torchrun the ranks share the candidates.

    Raises:
        ValueError: no budget, sizes beside it, or none that keeps it; prediction layers that are to be kept,
            and that no table describes.
    """
    budget, where = config.plan.budget, Workspace(workspace_of(config)).screen
    check_budget(config)
    checkpoint, scores, inputs = teacher_and_scores(config)
    keeps_predictions(checkpoint, config.plan.mtp)
    screener, inputs = screener_of(config, checkpoint, scores, inputs)
    times: LayerTimes | None = None
    if needs_latency(budget):
        times, item = times_of(config, checkpoint.architecture)
        inputs.append(item)
    settings = {
        name: value for name, value in asdict(budget).items() if name not in _DECIDE_NOTHING
    }
    settings |= {
        "serve": list(config.plan.serve), "layer_choice": config.plan.layer_choice,
        "depth": config.score.depth, "held_out": screener.key["held_out"], **merging(config),
    }  # fmt: skip

    def build(_state: Path, temporary: Path, ranks: Ranks) -> None:
        space, limits, source = searched(config, checkpoint, scores, times)
        write_tasks(config, screener.held_out, measured_tasks(config), ranks)
        found = _screen(budget, space, limits, screener, ranks)
        if ranks.rank == 0:
            machine = "" if times is None else times.machine
            _write(temporary, budget, space, limits, source, found, machine)

    return Recipe(where, "screen", settings, inputs, build, lambda: _summary(where))


def check_budget(config: Config, screens: bool = True) -> None:
    """Refuses what no search can find sizes for, before anything is measured.

    Args:
        config: the whole configuration.
        screens: whether the sizes are screened; else those nearest to a target are taken.

    Raises:
        ValueError: a plan without a budget, or with sizes beside it; layers that go one after the other;
            no target where none is screened, or a choice of vocabularies where some are; a bound of time,
            and a choice that no table of layer times knows.
    """
    budget = config.plan.budget
    asked = [name for name in explicit_targets(config.plan) if name not in NOT_OF_A_SIZE]
    key = asks_for_search(budget)
    if key is None:
        raise ValueError(
            "plan.budget: expected how large the model may be, as in plan.budget.params=4e9 or "
            "plan.budget.memory_bytes=6e9, found nothing"
        )
    if asked:
        raise ValueError(f"plan.{asked[0]}: either sizes or plan.budget.{key}, found both")
    if config.plan.layer_choice == "greedy" and (not budget.choices or "layers" in budget.choices):
        raise ValueError(
            "plan.layer_choice=greedy: score removes one layer after the other down to plan.layers, and "
            f"plan.budget.{key} asks for a search of many depths; use plan.layer_choice=scattered or "
            "contiguous, or plan.budget.choices without layers"
        )
    if screens and VOCAB in budget.choices:  # what is held out would be read in other tokens
        raise ValueError(
            "plan.budget.choices.vocab: screening reads with the whole vocabulary; use "
            "plan.budget.screened=0, which distils the sizes nearest to plan.budget.params"
        )
    if not screens and budget.params is None:
        raise ValueError(
            "plan.budget.params: expected how large the model may be, as in 4e9, found null; "
            "plan.budget.screened=0 takes the sizes nearest to it"
        )
    for name in (VOCAB, CHOSEN_EXPERTS):
        if name in budget.choices and needs_latency(budget):
            bound = "speedup" if budget.latency_ms is None else "latency_ms"
            raise ValueError(
                f"plan.budget.{bound}: the table of layer times does not say what another {name} saves; "
                f"leave out plan.budget.choices.{name}, or the bound"
            )


def nearest(config: Config) -> list[tuple[dict[str, int], int]]:
    """The sizes within ``plan.budget`` with their parameters, those nearest to ``params`` first.

    What a search distils where it screens none. On a tie the smaller sizes come first.

    Raises:
        ValueError: no target, or see ``check_budget`` and ``searched``.
    """
    budget = config.plan.budget
    check_budget(config, screens=False)
    assert budget.params is not None
    source = open_checkpoint(teacher_folder(config)[0])
    check_head_merge_of_search(source.architecture, config.plan.head_merge)
    keeps_predictions(source, config.plan.mtp)
    checkpoint, scores, _ = teacher_and_scores(config)
    timed = needs_latency(budget)
    times = times_of(config, checkpoint.architecture)[0] if timed else None
    space, limits, _ = searched(config, checkpoint, scores, times, wide=False)
    inside = within(space, limits, "plan.budget")
    smaller = [space.sizes[name][inside] for name in reversed(list(space.sizes))]
    away = np.abs(space.costs[budget.measure][inside] - budget.params)
    found = [int(row) for row in inside[np.lexsort([*smaller, away])]]
    asked = len(space.choices["layers"]) > 1 or "layers" in budget.choices
    left_out = () if asked else ("layers",)  # a space always names them
    return [
        (
            {name: size for name, size in space.at(row).items() if name not in left_out},
            round(space.cost(row)["parameters"]),
        )
        for row in found
    ]


def searched(
    config: Config,
    checkpoint: Checkpoint,
    scores: Scores,
    times: LayerTimes | None,
    wide: bool = True,
) -> tuple[Space, Limits, dict[str, float]]:
    """All sizes that the search may choose from, what they may cost, and what the source costs.

    Args:
        config: the whole configuration.
        checkpoint: the model that is cut.
        scores: which of its layers stay.
        times: what its layers take, where a bound is one of time.
        wide: whether a default grid is for a search that looks at many.

    Raises:
        ValueError: see ``limits_of``, ``check_depths``, ``size_space`` and ``within``.
    """
    budget, model = config.plan.budget, served(checkpoint.architecture, config.plan.serve)
    latency = None if times is None else latency_of(times, model)
    terms = Terms(budget.dtype, budget.cache_dtype, budget.batch, budget.context, latency)
    source = source_costs(model, terms)
    limits = limits_of(budget, source)

    def keep(count: int) -> Sequence[int]:
        plan = replace(config.plan, layers=count)
        return layers_of_plan(replace(config, plan=plan), model.sizes, scores)

    if budget.choices:
        given = whole_choices(budget.choices)
        depths = checked_choices(model, given, "plan.budget", MOST)["layers"]
        check_depths(config, model.sizes["layers"], map(int, depths), scores)
        space = size_space(model, given, terms, keep, "plan.budget")
        within(space, limits, "plan.budget")
        return space, limits, source
    share = min(
        share_of(limits, source) if wide else _share_of_target(budget, limits, source), 0.999
    )
    for factor in _WIDER:
        choices = default_choices(model, share * factor, wide)
        if "layers" in scores.ranking:  # else score.depth=none: no layer is to go
            check_depths(config, model.sizes["layers"], choices.get("layers", ()), scores)
        space = size_space(model, choices, terms, keep, "plan.budget")
        try:
            within(space, limits, "plan.budget")
            return space, limits, source
        except ValueError:
            if factor == _WIDER[-1]:
                raise
    raise AssertionError("one of the factors is the last")


def _share_of_target(budget: BudgetConfig, limits: Limits, source: Mapping[str, float]) -> float:
    """The part of the source's cost that ``params`` asks for, or less where another bound leaves less."""
    assert budget.params is not None
    others = {name: limit for name, limit in limits.items() if name != budget.measure}
    return min(budget.params / source[budget.measure], share_of(others, source))


def _screen(
    budget: BudgetConfig, space: Space, limits: Limits, screener: Screener, ranks: Ranks
) -> tuple[list[Screened], int, int, np.ndarray[Any, Any]]:
    """Measures half of the candidates spread over the front, and then twice where the others point."""
    inside = within(space, limits, "plan.budget")
    best = front(space, inside)
    rows = pool(best if len(best) >= budget.screened else inside)
    points = shares(space, rows)
    count = max(1, min(budget.screened, len(rows)))
    known: list[int] = []
    found: list[Screened] = []

    def measure(chosen: Sequence[int], advance: Callable[[int], None]) -> None:
        mine = []
        for row in list(chosen)[ranks.rank :: ranks.size]:
            mine.append((row, _measured(budget, space, int(rows[row]), screener)))
            advance(1)
        losses = dict(pair for each in ranks.gather(mine) for pair in each)
        known.extend(chosen)
        found.extend(losses[row] for row in chosen)

    with bar("screening", -(-count // ranks.size)) as advance:
        measure(spread(points, -(-count // 2)), advance)
        while len(known) < count:
            values = [np.nan if one.judged is None else one.judged for one in found]
            more = promising(points, known, values, max(1, min(count - len(known), count // 4)))
            if not more:
                break
            measure(more, advance)
    return found, len(inside), len(best), points[known]


def _measured(budget: BudgetConfig, space: Space, index: int, screener: Screener) -> Screened:
    sizes = space.at(index)
    layers = space.kept[sizes["layers"]]
    found = screener.measure(sizes, layers)
    return screened(budget.metric, sizes, layers, space.cost(index), found)


def _write(
    folder: Path,
    budget: BudgetConfig,
    space: Space,
    limits: Limits,
    source: Mapping[str, float],
    measured: tuple[list[Screened], int, int, np.ndarray[Any, Any]],
    machine: str,
) -> None:
    found, inside, best, points = measured
    values = [np.nan if one.judged is None else one.judged for one in found]
    order = [int(row) for row in np.argsort(np.nan_to_num(values, nan=np.inf), kind="stable")]
    chosen = varied(points, values, budget.candidates)
    write_json(folder / FILE, asdict(Screen(
        budget.metric, dict(source), dict(limits), len(space), inside, best, machine,
        [order.index(row) for row in chosen], [found[row] for row in order],
    )))  # fmt: skip


def _summary(folder: Path) -> Summary:
    screen = read_screen(folder)
    costs = [name for name in screen.limits]
    columns = ("sizes", *costs, "held-out loss", screen.metric)
    rows = []
    for number in screen.chosen:
        one = screen.candidates[number]
        loss = "–" if one.loss is None else f"{one.loss:.4f}"
        judged = "–" if one.judged is None else f"{abs(one.judged):.4f}"
        sizes = " ".join(f"{axis}={size}" for axis, size in one.sizes.items())
        rows.append((sizes, *(f"{one.costs[name]:,.6g}" for name in costs), loss, judged))
    headline = (
        f"{len(screen.candidates)} of {screen.sizes_within:,} sizes within the budget measured as they are "
        f"cut ({screen.sizes_possible:,} possible, {screen.sizes_on_front:,} that could not keep more)"
    )
    notes = (f"latency is that of {screen.machine}",) if screen.machine else ()
    return Summary(headline, columns, tuple(rows), asdict(screen), notes)
