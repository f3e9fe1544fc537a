"""A cascade: cut a part, distil, and again; beside it the same size in one cut, on as many tokens."""

import copy
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.config.compose import as_dict, from_dict
from nemo_minitron.config.config import Config
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.flows.compress import compress, run_name, run_stages, workspace_wait_seconds
from nemo_minitron.flows.forms import Launch, cli_words, composed
from nemo_minitron.flows.masked_failures import flow
from nemo_minitron.flows.sweep import Outcome, show
from nemo_minitron.launch.launcher import hold_workspace
from nemo_minitron.pruning.budget import asks_for_search
from nemo_minitron.pruning.head_merge import HEADS
from nemo_minitron.pruning.target_sizes import NOT_OF_A_SIZE, explicit_targets
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.command_log import note_command
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json

ONE_SHOT = "one-shot"


@flow(name="cascade", flow_run_name=run_name)
def cascade(
    sizes: list[Any] | None = None,
    config_name: str = "config",
    overrides: list[str] | None = None,
    workspace: str | None = None,
    model: str | None = None,
    data: list[str] | None = None,
    launch: Launch | None = None,  # type: ignore[valid-type]
    config: dict[str, Any] | None = None,
    command: str | None = None,
) -> list[Result]:
    """Cuts a model in several steps, each distilled before the next, and each with an export.

    Run again on the same workspace, it resumes; finished steps are not made twice.

    Args:
        sizes: what each step cuts to: [{"ffn": 9216}, {"ffn": 7168}], or numbers of parameters; None: what
            the configuration says (``cascade.sizes``).
        config_name: configuration to start from.
        overrides: in Hydra's grammar: cascade.teacher=previous, trainer.max_steps=2000 (of each step).
        workspace: folder of the cascade; each step has its own in ``steps/``.
        model: hub id or folder of the model to compress.
        data: text to train on.
        launch: where stages run, and what they are allowed.
        config: a whole configuration instead of all of these.
        command: the command line behind it, for the report.

    Returns:
        What the last step's export reports, and the evaluation of all steps side by side.
    """
    if config is None:
        base = composed(config_name, overrides, workspace, model, data, None, launch)
    else:
        base = from_dict(config)
    base.cascade.sizes = base.cascade.sizes if sizes is None else sizes
    base = from_dict(as_dict(base))
    check(base)
    words = cli_words(config_name, overrides, workspace, model, data, None, launch)
    given = f"cascade.sizes={base.cascade.sizes}".replace("'", "").replace(" ", "")
    line = shlex.split(command) if command else ["minitron", "run", *words, given]
    place = Path(base.workspace)
    with hold_workspace(place, workspace_wait_seconds(base.launch)):
        note_command(place, line)
        run_stages(_before(base), base)
        first, _ = teacher_folder(base)
        results = _steps(base, first.resolve(), shlex.join(line))
        results.append(_side_by_side(base, results[-1].folder))
    return results


def check(base: Config) -> None:
    """Refuses a cascade that contradicts itself, before anything is made.

    Raises:
        ValueError: no sizes, an unknown axis, no number, sizes beside those of the steps, or two teachers.
    """
    where = "cascade.sizes"
    if not base.cascade.sizes:
        raise ValueError(
            f"{where}: expected what each step cuts to, as in [{{ffn: 9216}}], found []"
        )
    asked = [name for name in explicit_targets(base.plan) if name not in NOT_OF_A_SIZE]
    bound = asks_for_search(base.plan.budget)
    if asked or bound is not None:
        found = f"plan.{asked[0]}" if asked else f"plan.budget.{bound}"
        raise ValueError(f"{found}: either sizes of one cut or {where}, found both")
    if base.cascade.teacher == "previous" and base.distill.teacher is not None:
        raise ValueError(
            "distill.teacher: either one teacher or cascade.teacher=previous, found both"
        )
    for number, size in enumerate(base.cascade.sizes):
        if isinstance(size, Mapping) and size:
            known = [
                n for n, value in vars(base.plan).items() if value is None and n not in _NO_SIZES
            ]
            for axis, value in size.items():
                if axis not in known or not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError(
                        f"{where}[{number}].{axis}: expected a whole number for one of "
                        f"{', '.join(known)}, found {value!r}"
                    )
        elif isinstance(size, bool) or not isinstance(size, int | float):
            raise ValueError(
                f"{where}[{number}]: expected sizes by axis, as in {{ffn: 9216}}, or a number of parameters, "
                f"found {size!r}"
            )


_NO_SIZES = ("drop_layers", "layer_choice", "mtp", "vocab", "vocab_coverage")
"""Of the plan's keys, those that are no size of a step: all models of a cascade read the same tokens."""


def _before(base: Config) -> list[str]:
    """What comes before the first cut, once for all steps."""
    first = ["pretrain"] if base.pretrain.enabled else []
    return [*first, "download", *(["correct"] if base.correct.enabled else [])]


def _steps(base: Config, first: Path, command: str) -> list[Result]:
    """Runs all steps, and then the one shot; what the last step's export reports."""
    place, source = Workspace(Path(base.workspace)), first
    count = len(base.cascade.sizes)
    exported: list[Result] = []
    for number in range(count):
        own = _step(base, str(number + 1), source, first, last=number + 1 == count)
        _cut_to(own, base.cascade.sizes[number])
        _share(base, own)
        exported = [compress(config=as_dict(own), command=command)[-1]]
        source = place.step(str(number + 1)).export.resolve()
    if base.cascade.one_shot and count > 1:
        own = _step(base, ONE_SHOT, first, first, last=False)
        _cut_to(own, base.cascade.sizes[-1])
        for key in ("max_steps", "max_epochs"):
            if isinstance(own.trainer.get(key), int) and own.trainer[key] > 0:  # -1: no limit
                own.trainer[key] *= count
        if own.training.max_tokens is not None:
            own.training.max_tokens *= count
        _share(base, own)
        compress(config=as_dict(own), command=command)
    return exported


def _step(base: Config, name: str, source: Path, first: Path, last: bool) -> Config:
    """The configuration of one step: from a source to an export, measured against the first source."""
    own = copy.deepcopy(base)
    own.workspace = str(Workspace(Path(base.workspace)).step(name).root)
    own.cascade.sizes = []
    own.source.model, own.source.revision = str(source), None
    own.pretrain.enabled = own.correct.enabled = False
    if source != first:
        own.evaluate.teacher = str(first)
        if base.cascade.teacher == "source" and base.distill.teacher is None:
            own.distill.teacher = str(first)
    if not last:  # what all are asked, they are asked side by side
        evaluate, export = own.evaluate, own.export
        evaluate.tasks, evaluate.prompts, evaluate.speed = [], 0, False
        evaluate.from_scratch, evaluate.min_retention, evaluate.floors = False, None, []
        evaluate.previous, export.push_to_hub, export.tag = None, None, None
    return own


def _cut_to(own: Config, size: Any) -> None:
    if isinstance(size, Mapping):
        for axis, units in size.items():
            setattr(own.plan, axis, units)
        if HEADS not in size:
            own.plan.head_merge = "none"
    else:
        own.plan.budget.params = float(size)


def _share(base: Config, own: Config) -> None:
    """Links into a step's workspace, relatively, what is known of the text: commits on the hub, and tokens.

    A search has workspaces further below, where tokens are not shared.
    """
    above, below = Workspace(Path(base.workspace)), Workspace(Path(own.workspace))
    links = {below.data_commits: above.data_commits}
    if own.plan.budget.params is None:
        links[below.tokens] = above.tokens
    for link, target in links.items():
        if not link.is_symlink() and not link.exists():
            target.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def _side_by_side(base: Config, last: Path) -> Result:
    """Measures the exports of all steps against the first source, on the same documents, in one report."""
    place, count = Workspace(Path(base.workspace)), len(base.cascade.sizes)
    own = copy.deepcopy(base)
    own.cascade.sizes = []
    own.evaluate.model = str(last)
    own.evaluate.from_scratch = False
    own.evaluate.min_retention, own.evaluate.floors, own.evaluate.previous = None, [], None
    beside = {f"step-{number}": place.step(str(number)).export for number in range(1, count)}
    if base.cascade.one_shot and count > 1:
        beside[ONE_SHOT] = place.step(ONE_SHOT).export
    own.evaluate.beside = {name: str(folder) for name, folder in beside.items()}
    (result,) = run_stages(["evaluate"], own, base)
    models = read_report(place.report)["models"]
    named = {**{name: name for name in beside}, "student": f"step-{count}"}
    rows = [
        Outcome(title, row["parameters"], None, row["loss"], row["retention"], None)
        for name, title in sorted(named.items(), key=lambda item: item[1])
        for row in [models[name]]
    ]
    write_json(place.cascade, {
        "sizes": base.cascade.sizes, "teacher": base.cascade.teacher,
        "steps": [vars(row) for row in rows],
    })  # fmt: skip
    show(place.root, "cascade", rows)
    return result
