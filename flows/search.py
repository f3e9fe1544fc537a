"""The best size for a budget: candidates, short distillations, then the whole way with the winner.

Rankings move much in the first hundred steps and then settle ([P1] section 4.3): a candidate is
judged after it was distilled for a while, not as it was cut; the better part is kept (successive
halving, arXiv 1502.07943).
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import as_dict, from_dict
from nemo_minitron.config.config import Config
from nemo_minitron.flows.compress import run_name, run_stages, steps, workspace_wait_seconds
from nemo_minitron.flows.forms import Launch, cli_words, composed
from nemo_minitron.flows.masked_failures import flow
from nemo_minitron.flows.sweep import Outcome, run_variants, score_once, show
from nemo_minitron.launch.launcher import hold_workspace
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.serving import served
from nemo_minitron.pruning.size_search import Candidate, candidates, default_choices, halving, rungs
from nemo_minitron.pruning.target_sizes import explicit_targets
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.command_log import note_command
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json


@dataclass(frozen=True)
class Round:
    """One round of the search: steps per candidate, and the outcomes, best first."""

    steps: int
    outcomes: tuple[Outcome, ...]


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

    Candidates are cut from one scoring and distilled for a few steps; the better half goes on with
    twice as many, until one is left. What is measured lies in ``rounds/``, the choice in
    ``search.json``.

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
        score_once(checked)
        sizes = choose(checked)
        results = []
        if compress_best:
            chosen = from_dict(as_dict(checked))
            for name, size in sizes.items():
                setattr(chosen.plan, name, size)
            chosen.plan.budget.params = None
            results = run_stages(list(steps(chosen)), chosen)
    return results


def choose(config: Config) -> dict[str, int]:
    """The sizes of the best candidate.

    Raises:
        ValueError: no budget, sizes beside it, or no candidate in its window.
    """
    budget, place = config.plan.budget, Path(config.workspace)
    found = _candidates(config)[: budget.candidates]
    named = {_name(candidate): candidate for candidate in found}
    rounds: list[Round] = []
    latest: dict[str, Outcome] = {}
    left = list(named)
    for count, length in rungs(len(left), budget.steps, budget.factor):
        left = left[:count]
        configs = {name: _short(config, name, named[name], length) for name in left}
        outcomes = run_variants(config, configs)
        losses = [float("nan") if o.loss is None else o.loss for o in outcomes]
        if all(outcome.failure is not None for outcome in outcomes):
            raise RuntimeError(f"every candidate failed: {outcomes[0].failure}")
        left = [outcomes[i].name for i in halving(losses, len(outcomes))]
        rounds.append(Round(length, tuple(outcomes)))
        latest |= {outcome.name: outcome for outcome in outcomes}
        write_json(Workspace(place).search, {
            "budget": asdict(budget), "winner": left[0], "sizes": dict(named[left[0]].sizes),
            "candidates": {
                name: {**candidate.sizes, "parameters": candidate.size.parameters}
                for name, candidate in named.items()
            },
            "rounds": [asdict(each) for each in rounds],
        })  # fmt: skip
    rest = [latest[name] for name in named if name not in left]
    show(place, "search", [*(latest[name] for name in left), *rest])
    return dict(named[left[0]].sizes)


def _candidates(config: Config) -> list[Candidate]:
    budget = config.plan.budget
    asked = [name for name in explicit_targets(config.plan) if name != "layer_choice"]
    if budget.params is None:
        raise ValueError(
            "plan.budget.params: expected how large the model may be, as in 4e9, found null"
        )
    if asked:
        raise ValueError(f"plan.{asked[0]}: either sizes or plan.budget.params, found both")
    folder, _ = teacher_folder(config)
    checkpoint = open_checkpoint(folder)
    model = served(checkpoint.architecture, config.plan.serve)
    whole = getattr(model_size(model), budget.measure)
    least, most = (round(budget.params * (1 + sign * budget.tolerance)) for sign in (-1, 1))
    choices: Mapping[str, Any] = budget.choices or default_choices(model, budget.params / whole)
    return candidates(
        model,
        choices,
        least,
        most,
        budget.measure,
        where="plan.budget",
    )


def _name(candidate: Candidate) -> str:
    """A candidate's name, made of the sizes that it changes."""
    return "-".join(f"{axis}{size}" for axis, size in candidate.sizes.items())


def _short(config: Config, name: str, candidate: Candidate, length: int) -> Config:
    """The configuration of a candidate's short distillation: only its held-out loss is measured."""
    short = from_dict(as_dict(config))
    short.workspace = str(Workspace(Path(config.workspace)).round(length, name))
    short.plan.budget.params = None
    for axis, size in candidate.sizes.items():
        setattr(short.plan, axis, size)
    short.training.max_tokens = None
    short.training.tasks, short.training.keep, short.training.phases = [], "last", []
    short.trainer["max_steps"] = length
    short.training.validate_every = length
    sched = short.optim.get("sched") or {}
    if sched.get("warmup_steps"):
        sched["warmup_steps"] = min(sched["warmup_steps"], max(1, length // 5))
    evaluate = short.evaluate
    evaluate.tasks, evaluate.prompts, evaluate.speed, evaluate.from_scratch = [], 0, False, False
    evaluate.min_retention, evaluate.floors, evaluate.previous = None, [], None
    return short
