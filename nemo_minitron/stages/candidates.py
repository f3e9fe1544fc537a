"""What the stages share that measure candidates in memory: the screener, and its inputs."""

import json
from pathlib import Path

from nemo_minitron.checkpoints.checkpoint import Checkpoint, main_dtype, open_checkpoint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.data.mixtures import held_out_windows, text_input, validation_text
from nemo_minitron.evaluation.screening import LOSS, Screener, split_metric
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.head_merge import check_head_merge_of_search
from nemo_minitron.pruning.target_sizes import HEAD_MERGE
from nemo_minitron.scoring.scores_file import Scores, check_scores, read_scores
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import Input, digest
from nemo_minitron.workspace.results import Results


def teacher_and_scores(config: Config) -> tuple[Checkpoint, Scores, list[Input]]:
    """The model that is cut, its importance scores, and both as inputs.

    Raises:
        ValueError: one of them has not been made yet, or is damaged.
    """
    workspace = Workspace(workspace_of(config))
    folder, teacher = teacher_folder(config)
    checkpoint = open_checkpoint(folder)
    inputs = [teacher, input_artifact(workspace.root, "scores", "score")]
    scores = read_scores(workspace.scores)
    check_scores(workspace.scores, scores, checkpoint.family, checkpoint.architecture.sizes)
    return checkpoint, scores, inputs


def measured_tasks(config: Config) -> list[str]:
    """The tasks of ``plan.budget``, and that of its metric."""
    budget = config.plan.budget
    own = split_metric(budget.metric)[0]
    return list(dict.fromkeys([*budget.tasks, *([] if own == LOSS else [own])]))


def screener_of(
    config: Config, checkpoint: Checkpoint, scores: Scores, inputs: list[Input]
) -> tuple[Screener, list[Input]]:
    """Measures candidates on the held-out text and the tasks of ``plan.budget``.

    Raises:
        ValueError: an unknown task, no held-out text, or a ``plan.head_merge`` that not every candidate
            can have.
    """
    from nemo_minitron.models.causal_lm import load_tokenizer

    workspace, names = Workspace(workspace_of(config)), measured_tasks(config)
    budget, head_merge = config.plan.budget, config.plan.head_merge
    check_head_merge_of_search(checkpoint.architecture, head_merge)
    texts = validation_text(config)
    prints = _prints(config, names)
    more = [text_input(texts)]
    if prints:
        more.append(Input(config.evaluate.task_dir or "lm_eval", digest(prints)))
    tokenizer = load_tokenizer(checkpoint.folder)
    key = {
        "what": "candidate", "model": checkpoint.fingerprint, "scores": inputs[1].fingerprint,
        "dtype": main_dtype(checkpoint), "text": texts.fingerprint,
        "held_out": held_out_windows(config, tokenizer), "samples": budget.screen_samples,
        "tasks": prints, "task_limit": budget.task_limit if prints else None, **merging(config),
    }  # fmt: skip

    def samples() -> object:
        from nemo_minitron.data.mixtures import validation_packed

        packed = validation_packed(config, tokenizer)
        return packed.samples[: budget.screen_samples]

    evaluate = config.evaluate
    return Screener(
        checkpoint, lambda: scores.ranking, samples, json.loads(json.dumps(key)),
        Results(workspace.results), prints, evaluate.task_dir,
        workspace.held_out_tasks(texts.fingerprint), budget.task_limit, evaluate.batch_size,
        evaluate.device, head_merge,
    ), [*inputs, *more]  # fmt: skip


def merging(config: Config) -> dict[str, str]:
    """``plan.head_merge`` where it is set: what has none keeps the fingerprint that it had."""
    how = config.plan.head_merge
    return {} if how == "none" else {HEAD_MERGE: how}


def _prints(config: Config, names: list[str]) -> dict[str, object]:
    if not names:
        return {}
    from nemo_minitron.evaluation.lm_eval import check_tasks
    from nemo_minitron.evaluation.task_files import task_print

    check_tasks(names, config.evaluate.task_dir)
    return {name: task_print(name, config.evaluate.task_dir) for name in names}


def write_tasks(config: Config, folder: Path, names: list[str], ranks: Ranks) -> None:
    """Rank 0 writes the data of the tasks that are made from held-out text, where it is not there yet."""

    def write() -> None:
        from nemo_minitron.data.documents import documents, plain
        from nemo_minitron.evaluation.held_out_tasks import is_made_here, write_held_out_tasks
        from nemo_minitron.workspace.build import building

        if any(map(is_made_here, names)) and not folder.is_dir():
            with building(folder) as temporary:
                write_held_out_tasks(plain(documents(validation_text(config))), temporary)

    ranks.first(write)
