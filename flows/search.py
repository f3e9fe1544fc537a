"""The best size for a budget: candidates, short distillations, then the whole way with the winner.

Of all sizes within the budget a few dozen are measured in memory as they are cut (the stage screen).
Rankings move much in the first hundred steps and then settle ([P1] section 4.3): the best of them are
judged after they were distilled for a while, and the better part is kept (successive halving, arXiv
1502.07943).
"""

import copy
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import from_dict
from nemo_minitron.config.config import Config
from nemo_minitron.config.plan_config import BudgetConfig
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.evaluation.screening import read_screen, value_of
from nemo_minitron.flows.compress import run_name, run_stages, steps, workspace_wait_seconds
from nemo_minitron.flows.forms import Launch, cli_words, composed
from nemo_minitron.flows.masked_failures import flow
from nemo_minitron.flows.sweep import Outcome, run_variants, score_once, show
from nemo_minitron.launch.launcher import hold_workspace, ranks_of
from nemo_minitron.pruning.budget import needs_latency
from nemo_minitron.pruning.head_merge import merges
from nemo_minitron.pruning.select import complete_targets
from nemo_minitron.pruning.shortlist import rank_correlation
from nemo_minitron.pruning.size_search import halving, rungs
from nemo_minitron.stages.candidates import measured_tasks
from nemo_minitron.stages.going_on import whole_only
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.result import Result
from nemo_minitron.stages.screen import check_budget, nearest
from nemo_minitron.stages.training_steps import resolved_trainer
from nemo_minitron.workspace.command_log import note_command
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json


@dataclass(frozen=True)
class Round:
    """One round of the search: steps per candidate, and the outcomes, best first.

    Attributes:
        steps: of each candidate.
        outcomes: the best first.
        judged: candidate to what ``plan.budget.metric`` says of it, less is better; null: nothing.
    """

    steps: int
    outcomes: tuple[Outcome, ...]
    judged: Mapping[str, float | None]


@flow(name="search", flow_run_name=run_name)
def search(
    config_name: str = "config",
    overrides: list[str] | None = None,
    workspace: str | None = None,
    model: str | None = None,
    data: list[str] | None = None,
    launch: Launch | None = None,  # type: ignore[valid-type]
    compress_best: bool = True,
    config: dict[str, Any] | None = None,
    command: str | None = None,
) -> list[Result]:
    """Finds sizes within ``plan.budget``, and compresses the model to the best of them.

    Of all sizes within it some are measured in memory; the best are distilled for a few steps, and
    the better half advances with twice as many, until one is left. What is measured lies in
    ``screen/`` and ``rounds/``, the choice in ``search.json``.

    Args:
        config_name: configuration to start from.
        overrides: in Hydra's grammar: plan.budget.params=4e9,
            +plan.budget.choices.hidden=[2560,3072].
        workspace: folder of the run.
        model: hub id or folder of the model to compress.
        data: text to train on.
        launch: where stages run, and what they are allowed.
        compress_best: whether the winner goes the whole way to an export; else all ends with the
            choice.
        config: a whole configuration instead of all of these.
        command: the command line behind it, for the report.

    Returns:
        What each stage of the winner reports; nothing without ``compress_best``.
    """
    if config is None:
        checked = composed(config_name, overrides, workspace, model, data, None, launch)
    else:
        checked = from_dict(config)
    line = [
        "minitron",
        "run",
        *cli_words(config_name, overrides, workspace, model, data, None, launch),
    ]
    place = Path(checked.workspace)
    with hold_workspace(place, workspace_wait_seconds(checked.launch)):
        note_command(place, shlex.split(command) if command else line)
        check_budget(checked, screens=checked.plan.budget.screened > 0)  # before hours of scoring
        _check_continued(checked)
        score_once(checked)
        sizes, begun = choose(checked)
        results = []
        if compress_best:
            chosen = copy.deepcopy(checked)
            _cut_to(chosen, sizes, checked)
            if checked.plan.budget.continued:
                chosen.distill.go_on_from = str(begun.absolute())
            results = run_stages(list(steps(chosen)), chosen, checked)
    return results


def choose(config: Config) -> tuple[dict[str, int], Path]:
    """The sizes of the best candidate, and the student that came of its last round.

    Raises:
        ValueError: no budget, sizes beside it, or no candidate within it.
    """
    budget, place = config.plan.budget, Path(config.workspace)
    _check_continued(config)
    found, screened = _shortlist(config)
    named = {_name(sizes): (sizes, size) for sizes, size in found}
    rounds: list[Round] = []
    latest: dict[str, Outcome] = {}
    left = list(named)
    before: int | None = None
    for count, length in rungs(len(left), budget.steps, budget.factor):
        left = left[:count]
        configs = {name: _short(config, name, named[name][0], length, before) for name in left}
        before = length
        outcomes = run_variants(config, configs)
        if all(outcome.failure is not None for outcome in outcomes):
            raise RuntimeError(f"every candidate failed: {outcomes[0].failure}")
        values = [_judged(budget.metric, outcome, configs) for outcome in outcomes]
        order = halving(values, len(outcomes))
        left = [outcomes[i].name for i in order]
        judged = {outcomes[i].name: None if math.isnan(values[i]) else values[i] for i in order}
        rounds.append(Round(length, tuple(outcomes[i] for i in order), judged))
        latest |= {outcome.name: outcome for outcome in outcomes}
        write_json(Workspace(place).search, {
            "budget": asdict(budget), "winner": left[0], "sizes": dict(named[left[0]][0]),
            "candidates": {
                name: {**sizes, "parameters": parameters}
                for name, (sizes, parameters) in named.items()
            },
            "rounds": [asdict(each) for each in rounds],
            "screened": screened,
            "rank_correlation": _correlations(screened, rounds),
        })  # fmt: skip
    rest = [latest[name] for name in named if name not in left]
    show(place, "search", [*(latest[name] for name in left), *rest])
    return dict(named[left[0]][0]), Workspace(Path(configs[left[0]].workspace)).student


def _check_continued(config: Config) -> None:
    """Refuses rounds that a winner's whole training could not resume from.

    Raises:
        ValueError: they are asked for.
    """
    if not config.plan.budget.continued:
        return
    unlike = {
        "distill.teacher_logits=cache": config.distill.teacher_logits == "cache",
        "distill.live_teacher": config.distill.live_teacher is not None,
    }
    for key in [*whole_only(config), *(key for key, asked in unlike.items() if asked)]:
        raise ValueError(
            f"plan.budget.continued: a training with {key} cannot resume from a round; choose one"
        )


def _shortlist(
    config: Config,
) -> tuple[list[tuple[Mapping[str, int], int]], dict[str, float | None]]:
    """The candidates to distil with their parameters, and what screening said of all that it measured."""
    budget, place = config.plan.budget, Workspace(Path(config.workspace))
    check_budget(config, screens=budget.screened > 0)
    if needs_latency(budget) and budget.layer_times is None:
        run_stages(["measure-layers"], config)
    if budget.screened == 0:
        return [*nearest(config)[: budget.candidates]], {}
    run_stages(["screen"], config)
    screen = read_screen(place.screen)
    chosen = [screen.candidates[number] for number in screen.chosen]
    return (
        [(one.sizes, round(one.costs["parameters"])) for one in chosen],
        {_name(one.sizes): one.judged for one in screen.candidates},
    )


def _judged(metric: str, outcome: Outcome, configs: Mapping[str, Config]) -> float:
    """What a metric says of a distilled candidate, less is better; NaN: nothing."""
    if outcome.failure is not None or outcome.loss is None:
        return math.nan
    workspace = Workspace(Path(configs[outcome.name].workspace))
    report = read_report(workspace.report)
    student = report["models"]["student"]
    tasks = student["tasks"] if "tasks" in student else {}
    return value_of(metric, outcome.loss, tasks, report["better"])


def _correlations(
    screened: Mapping[str, float | None], rounds: Sequence[Round]
) -> list[dict[str, Any]]:
    """Whether what came before predicted each round: rank correlation over the candidates of both."""
    before = [("screening", screened)] if screened else []
    series = [*before, *((f"{each.steps} steps", each.judged) for each in rounds)]
    rows = []
    for (one, first), (other, second) in itertools.pairwise(series):
        both = [name for name in second if first.get(name) is not None and second[name] is not None]
        values = [[float(each[name] or 0) for name in both] for each in (first, second)]
        rows.append({
            "of": one, "with": other, "candidates": len(both),
            "spearman": rank_correlation(*values),
        })  # fmt: skip
    return rows


def _name(sizes: Mapping[str, int]) -> str:
    """A candidate's name, made of the sizes that it changes."""
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


def _cut_to(own: Config, sizes: Mapping[str, int], base: Config) -> None:
    """Puts a candidate's sizes in the place of the budget; heads are merged where it has fewer in a group."""
    own.plan.budget = BudgetConfig()
    for axis, size in sizes.items():
        setattr(own.plan, axis, size)
    if own.plan.head_merge != "none":
        model = open_checkpoint(teacher_folder(base)[0]).architecture
        if not merges(model, complete_targets(model.family, model.sizes, sizes)):
            own.plan.head_merge = "none"


def _short(
    config: Config, name: str, sizes: Mapping[str, int], length: int, before: int | None = None
) -> Config:
    """The configuration of a candidate's round: only what judges it is measured.

    Args:
        config: the search's.
        name: the candidate's.
        sizes: its sizes.
        length: steps of the round.
        before: those of the round before; None: it is the first.
    """
    short = copy.deepcopy(config)
    short.workspace = str(Workspace(Path(config.workspace)).round(length, name))
    _cut_to(short, sizes, config)
    short.training.tasks, short.training.keep = [], "last"
    short.training.validate_every = length
    if config.plan.budget.continued:
        short.distill.stop_after = length
        if before is not None:
            begun = Workspace(Workspace(Path(config.workspace)).round(before, name)).student
            short.distill.go_on_from = str(begun.absolute())
    else:
        _shortened(short, length)
        if short.exp_manager.get("create_early_stopping_callback"):  # every candidate as many steps
            short.exp_manager["create_early_stopping_callback"] = False
    evaluate = short.evaluate
    evaluate.tasks = measured_tasks(config)
    evaluate.prompts, evaluate.speed, evaluate.from_scratch = 0, False, False
    evaluate.min_retention, evaluate.floors, evaluate.previous = None, [], None
    return short


_SPANS = {
    "max_steps": 1, "constant_steps": 0, "hold_steps": 0, "decay_steps": 1, "step_size": 1,
    "step_size_up": 1, "step_size_down": 1,
}  # fmt: skip
"""Numbers of steps in a schedule, besides those of its warm-up, and the least that each can be."""


def _shortened(short: Config, length: int) -> None:
    """Lays out the schedule for the steps of one round: in the shape that the whole training's has.

    A warm-up is at most a fifth of the round; what comes behind it shrinks in proportion.
    """
    sched = short.optim.get("sched") or {}
    spans = {name: least for name, least in _SPANS.items() if sched.get(name)}
    whole = _whole_steps(short) if spans else length
    short.training.max_tokens, short.training.phases = None, []
    short.trainer["max_steps"] = length
    before = sched.get("warmup_steps") or 0  # one of a ratio shrinks by itself
    now = min(before, max(1, length // 5))
    if before:
        sched["warmup_steps"] = now
    share = (length - now) / max(1, whole - before)
    for name, least in spans.items():
        ahead, at = (before, now) if name == "max_steps" else (0, 0)  # counts the warm-up, too
        sched[name] = max(least, at + int((sched[name] - ahead) * share))


def _whole_steps(config: Config) -> int:
    """Steps of a candidate's whole training, by as many processes as the launch gives it.

    Raises:
        ValueError: it has no number of steps.
    """
    distill = config.distill.batch_size
    each = max(1, ranks_of(config, "distill") // config.training.tensor_parallel)
    steps = resolved_trainer(config, {}, distill * each).get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"trainer.max_steps: expected a positive whole number, found {steps!r}")
    return steps
