"""Several plans from one scoring, each distilled and measured, side by side.

What the variants share (the source, its correction, the scores, the tokenised text) lies in the
sweep's workspace and is linked into theirs; all are pruned in one pass over the teacher's weights.
"""

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.runtime import flow_run

from nemo_minitron.config.compose import as_dict, from_dict
from nemo_minitron.config.config import Config
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.flows import publish
from nemo_minitron.flows.compress import run_name, run_stages, steps, workspace_wait_seconds
from nemo_minitron.flows.forms import Launch, cli_words, composed
from nemo_minitron.flows.masked_failures import flow
from nemo_minitron.launch.launcher import hold_workspace
from nemo_minitron.security.masking import masked
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.command_log import note_command
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.pictures import inline

_DECIDES_SHARED = ("source", "families", "correct", "score", "data", "pretrain")
"""Sections of the configuration that decide what all variants share."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a variant.

    Attributes:
        name: of the variant.
        parameters: of its student.
        pruned_loss: held-out loss before distillation, nats per token.
        loss: and after it.
        retention: the teacher's perplexity over the student's.
        failure: why there are no numbers; None: there are.
    """

    name: str
    parameters: int | None = None
    pruned_loss: float | None = None
    loss: float | None = None
    retention: float | None = None
    failure: str | None = None


@flow(name="sweep", flow_run_name=run_name)
def sweep(
    variants: dict[str, list[str]],
    config_name: str = "config",
    overrides: list[str] | None = None,
    workspace: str | None = None,
    model: str | None = None,
    data: list[str] | None = None,
    launch: Launch | None = None,  # type: ignore[valid-type]
    export_best: bool = False,
) -> list[Outcome]:
    """Scores a model once, and prunes, distils and measures it in several ways.

    A variant that fails does not stop the others; run again, the flow resumes.

    Args:
        variants: name to overrides: {"shallow": ["plan.layers=24"], "thin": ["plan.hidden=3072"]}.
        config_name: configuration that all start from.
        overrides: in Hydra's grammar, for all of them.
        workspace: folder of the sweep; each variant has its own in ``variants/``.
        model: hub id or folder of the model to compress.
        data: text to train on.
        launch: where stages run, and what they are allowed.
        export_best: whether the variant with the least held-out loss is exported.

    Returns:
        What became of each, the best first.
    """
    base = composed(config_name, overrides, workspace, model, data, None, launch)
    configs = _configs(base, variants, config_name, overrides, workspace, model, data, launch)
    place = Path(base.workspace)
    with hold_workspace(place, workspace_wait_seconds(base.launch)):
        line = cli_words(config_name, overrides, workspace, model, data, None, launch)
        given = f"variants={json.dumps(variants)}"
        note_command(
            place, ["minitron", "deploy", "sweep", "--flow", "sweep", "--parameter", given, *line]
        )
        note_command(place, ["prefect", "deployment", "run", "sweep/sweep"])
        score_once(base)
        outcomes = run_variants(base, configs)
        write_json(Workspace(place).sweep, [asdict(outcome) for outcome in outcomes])
        show(place, "sweep", outcomes)
        if export_best and outcomes[0].failure is None:
            run_stages(["export"], configs[outcomes[0].name])
    failed = [
        f"{outcome.name}: {outcome.failure}" for outcome in outcomes if outcome.failure is not None
    ]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(outcomes)} variants failed: {'; '.join(failed)}")
    return outcomes


def _configs(base: Config, variants: Mapping[str, list[str]], *form: Any) -> dict[str, Config]:
    """Configuration of each variant.

    Raises:
        ValueError: a variant would change what all share, or has a name that is no folder's.
    """
    config_name, overrides, *rest = form
    if not variants:
        raise ValueError("variants: expected at least one name with its overrides")
    configs = {}
    for name, own in variants.items():
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"variants: expected a name that can be a folder's, found {name!r}")
        workspace, model, data, launch = rest
        config = composed(
            config_name, [*(overrides or []), *own], workspace, model, data, None, launch
        )
        for section in _DECIDES_SHARED:
            if getattr(config, section) != getattr(base, section):
                raise ValueError(
                    f"variants: {name!r} changes {section}, which all variants share; give it to all"
                )
        config.workspace = str(Workspace(Path(base.workspace)).variant(name))
        configs[name] = config
    return configs


def score_once(base: Config) -> None:
    """Runs what comes before the plan."""
    names = ["pretrain"] if base.pretrain.enabled else []
    names += ["download", *(["correct"] if base.correct.enabled else []), "score"]
    run_stages(names, base)


def run_variants(base: Config, configs: Mapping[str, Config]) -> list[Outcome]:
    """Plans all variants, prunes them in one pass, distils and measures one after the other, and compares."""
    place, broken = Path(base.workspace), []
    for name, config in configs.items():
        try:
            share(place, Path(config.workspace))
            run_stages(["plan"], config)
        except Exception as error:
            broken.append(_failed(name, error))
    names = [name for name in configs if name not in [outcome.name for outcome in broken]]
    if names:
        first = copy.deepcopy(configs[names[0]])
        first.prune.also = [configs[name].workspace for name in names[1:]]
        run_stages(["prune"], first, configs[names[0]])
    outcomes = [*(_outcome(name, configs[name]) for name in names), *broken]
    return sorted(
        outcomes,
        key=lambda each: math.inf if each.loss is None or math.isnan(each.loss) else each.loss,
    )


def _failed(name: str, error: Exception) -> Outcome:
    return Outcome(name, failure=masked(f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _outcome(name: str, config: Config) -> Outcome:
    """Distils and measures a variant; an error becomes part of the outcome and is not raised."""
    try:
        with hold_workspace(Path(config.workspace)):
            run_variant(as_dict(config))
    except Exception as error:
        return _failed(name, error)
    models = read_report(Workspace(Path(config.workspace)).report)["models"]
    student = models["student"]
    return Outcome(
        name,
        student["parameters"],
        models["pruned"]["loss"],
        student["loss"],
        student["retention"],
        None,
    )


def _variant_name() -> str:
    """What Prefect calls a variant's run."""
    workspace = flow_run.parameters["values"]["workspace"]
    return plain(masked(f"variant-{Path(workspace).name}"))


@flow(name="variant", flow_run_name=_variant_name)
def run_variant(values: dict[str, Any]) -> None:
    """Distils one pruned model and measures it.

    Args:
        values: the whole configuration as plain dictionaries.
    """
    config = from_dict(values)
    stages = list(steps(config))  # those up to the cut have been run for all variants
    run_stages([*stages[stages.index("prune") + 1 : stages.index("evaluate")], "evaluate"], config)


def share(place: Path, workspace: Path) -> None:
    """Links what all variants share into the workspace of one, relatively, so that the whole can be moved."""
    workspace.mkdir(parents=True, exist_ok=True)
    begun_by_variants = (Workspace(place).tokens, Workspace(place).data_commits)
    for link, target in zip(Workspace(workspace).shared, Workspace(place).shared, strict=True):
        if (target.exists() or target in begun_by_variants) and not link.is_symlink():
            target.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(target, workspace), target_is_directory=True)


def show(place: Path, kind: str, outcomes: Sequence[Outcome]) -> None:
    """Publishes the variants' outcomes, and draws their losses against their sizes.

    Args:
        place: the workspace, which gets the picture too.
        kind: ``sweep`` or ``search``.
        outcomes: the best first.
    """
    from nemo_minitron.evaluation.plots import pareto

    create_table_artifact(
        table=[publish.cells(asdict(outcome)) for outcome in outcomes], key=publish.key(place, kind, "table"),
        description=f"{len(outcomes)} variants, the best first",
    )  # fmt: skip
    points = [
        (o.name, o.parameters, o.loss)
        for o in outcomes
        if o.parameters is not None and o.loss is not None
    ]
    if points:
        picture = pareto(points)
        Workspace(place).pareto.write_bytes(picture)
        create_image_artifact(
            image_url=inline(picture), key=publish.key(place, kind, "pareto"),
            description="held-out loss against size",
        )  # fmt: skip
