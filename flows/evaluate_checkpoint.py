"""The evaluation of one checkpoint as a flow of its own, for instance every night of the newest export."""

from pathlib import Path

from nemo_minitron.evaluation.gate import LINEAGE
from nemo_minitron.evaluation.report_types import Lineage
from nemo_minitron.flows.compress import run_name, run_stages, workspace_wait_seconds
from nemo_minitron.flows.forms import Launch, cli_words, composed
from nemo_minitron.flows.masked_failures import flow
from nemo_minitron.launch.launcher import hold_workspace
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.command_log import note_command
from nemo_minitron.workspace.typed_json import read_json


@flow(name="evaluate_checkpoint", flow_run_name=run_name)
def evaluate_checkpoint(
    checkpoint: str,
    workspace: str,
    teacher: str | None = None,
    config_name: str = "config",
    overrides: list[str] | None = None,
    data: list[str] | None = None,
    previous: str | None = None,
    launch: Launch | None = None,  # type: ignore[valid-type]
) -> list[Result]:
    """Measures a checkpoint against its teacher on held-out text, tasks, free writing, speed, and judges it.

    What was measured of the same weights on the same data is not measured again: a night in which
    nothing changed costs seconds. The quality gate is the configuration's.

    Args:
        checkpoint: folder of a Hugging Face model, such as an export.
        workspace: folder for what is measured; the same every night.
        teacher: hub id or folder of the teacher; None: what the checkpoint's minitron.json says that
            it was measured against.
        config_name: configuration to start from.
        overrides: in Hydra's grammar: suite=minitron, evaluate.floors=[hellaswag:acc_norm:0.5].
        data: held-out text (``data.validation.paths``); None: what the configuration says.
        previous: an earlier export that this one must not fall behind (``evaluate.previous``).
        launch: where the stages run, and what they are allowed.

    Returns:
        What each stage reports.
    """
    folder = Path(checkpoint).expanduser()
    found, revision = (teacher, None) if teacher is not None else teacher_of(folder)
    config = composed(config_name, overrides, workspace, found, None, None, launch)
    config.source.revision = revision or config.source.revision
    config.evaluate.model = str(folder)
    if data is not None:
        config.data.validation.paths = data
    if previous is not None:
        config.evaluate.previous = previous
    place = Path(workspace)
    with hold_workspace(place, workspace_wait_seconds(config.launch)):
        line = cli_words(
            config_name, overrides, workspace, found, None, None, launch, source__revision=revision,
            data__validation__paths=data, evaluate__model=str(folder), evaluate__previous=previous,
        )  # fmt: skip
        for stage in ("download", "evaluate"):
            note_command(place, ["minitron", stage, *line])
        results = run_stages(["download", "evaluate"], config)
    return results


def teacher_of(export: Path) -> tuple[str, str | None]:
    """The model that an export's own report compares with, and its pinned revision, as its lineage has them.

    That is the model that it was made from, or what ``evaluate.teacher`` named instead: each step of a
    cascade is cut from the export before, and is judged by what the cascade began with.

    Raises:
        ValueError: it names none that can be found from here.
    """
    path = export / LINEAGE
    lineage = read_json(path, Lineage) if path.is_file() else {}
    stages = {each["kind"]: each for each in lineage.get("stages", [])}
    judged = stages["report"]["inputs"][:1] if "report" in stages else []
    if judged and judged[0].finished is None:  # evaluate.teacher, a folder
        return _named(path, judged[0].path, None, is_folder=True)
    made = stages.get("teacher")
    if made is None or len(made["inputs"]) != 1:
        raise ValueError(f"teacher: {export} has no {LINEAGE} that names one; give it")
    (source,) = made["inputs"]
    if source.finished is not None:  # a folder of the workspace that it was made in
        raise ValueError(f"teacher: {export} was made from a model of its own run; give its folder")
    return _named(path, source.path, made["config"].get("revision"), is_folder=False)


def _named(
    lineage: Path, found: str, revision: str | None, is_folder: bool
) -> tuple[str, str | None]:
    """The same, if it can be looked for.

    Raises:
        ValueError: it is a text to be resolved, with this machine's environment; or a folder that is
            not here, whose name would be taken for a hub id.
    """
    if "${" in f"{found}{revision}" or (is_folder and not Path(found).is_dir()):
        what = "no folder here" if is_folder else "no folder and no hub id"
        raise ValueError(f"teacher: {lineage} names {plain(found, 80)!r}, which is {what}; give it")
    return found, revision
