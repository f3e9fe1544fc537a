"""prune: a Hugging Face folder in, a smaller one out, as a stream of blocks.

No framework, no model in memory.
"""

from contextlib import ExitStack
from pathlib import Path

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.plan_file import cut_of, is_for, read_plan
from nemo_minitron.pruning.stream import planned_bytes, write_pruned
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.artifacts import check_bytes, input_artifact
from nemo_minitron.workspace.build import building, refuse_unknown_folder
from nemo_minitron.workspace.condition import condition
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.locks import locked
from nemo_minitron.workspace.manifest import Input, fingerprint, now, write_manifest
from nemo_minitron.workspace.progress_bar import bar


def run(config: Config) -> Result:
    """Cuts the teacher by the plan, and by the plans of ``prune.also`` in the same pass.

    Raises:
        ValueError: a workspace has no plan, or one for another model.
    """
    workspace = Workspace(workspace_of(config))
    source, teacher = teacher_folder(config)
    settings = {"shard_size": config.prune.shard_size}
    others = [Workspace(Path(other).expanduser()) for other in config.prune.also]
    with ExitStack() as stack:
        for other in others:
            stack.enter_context(locked(other.root))
        due = []
        for place in [workspace, *others]:
            inputs = [
                _seen_from(place, workspace, teacher),
                input_artifact(place.root, "plan", "plan"),
            ]
            expected = fingerprint("pruned", settings, inputs)
            if condition(place.pruned, expected, inputs).state != "done":
                due.append((place, inputs))
        if due:
            if source.parent in workspace.artifacts:  # what lies outside has no hashes
                check_bytes(source.parent)
            _build(source, due, settings, config.prune.shard_size)
    pruned = open_checkpoint(workspace.pruned)
    size = model_size(pruned.architecture)
    headline = f"{size.parameters:,} parameters in {workspace.pruned}"
    if others:
        headline += f", and {len(others)} more of the same pass"
    made = any(place == workspace for place, _ in due)
    return Result("prune", workspace.pruned, made, headline)


def _seen_from(place: Workspace, workspace: Workspace, teacher: Input) -> Input:
    """The source as an input of another workspace's artifact: its own pointer to the same model.

    Raises:
        ValueError: it points at another model, or at none.
    """
    if place == workspace:
        return teacher
    own = input_artifact(place.root, teacher.path, "download")
    if own.fingerprint != teacher.fingerprint:
        raise ValueError(
            f"prune.also: {place.root}: its source is another model than that of {workspace.root}"
        )
    return own


def _build(
    source: Path,
    due: list[tuple[Workspace, list[Input]]],
    settings: dict[str, int],
    shard_bytes: int,
) -> None:
    checkpoint = open_checkpoint(source)
    started = now()
    with ExitStack() as stack:
        targets = []
        for place, _ in due:
            plan = read_plan(place.plan)
            if not is_for(plan, checkpoint.architecture):
                raise ValueError(f"{place.plan}: made for a model of other sizes than {source}")
            cut = cut_of(plan, checkpoint.architecture)
            refuse_unknown_folder(place.pruned)
            targets.append((stack.enter_context(building(place.pruned)), cut))
        advance = stack.enter_context(
            bar("pruning", sum(planned_bytes(checkpoint, cut) for _, cut in targets))
        )
        hashes = write_pruned(checkpoint, targets, shard_bytes, advance)
        for (temporary, _), (_, inputs), known in zip(targets, due, hashes, strict=True):
            write_manifest(temporary, "pruned", settings, inputs, started, known)
