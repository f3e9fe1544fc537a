"""lm-eval's tasks on a model while it trains, through the same bridge as in an evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.data.mixtures import validation_text
from nemo_minitron.evaluation.answers import Answers, check_chat
from nemo_minitron.evaluation.held_out_tasks import (
    MADE_HERE,
    held_out_data,
    is_made_here,
    made_here,
    split_shots,
)
from nemo_minitron.evaluation.lm_eval import check_tasks, manager_of, run_task, unconnected
from nemo_minitron.evaluation.task_accuracy import ACCURACIES
from nemo_minitron.workspace.layout import Workspace

_WHERE = "training.tasks"


def task_data(config: Config, asked: Sequence[str]) -> Path:
    """The folder with the data of the tasks that are made from held-out text, made where one is asked for."""
    texts = validation_text(config)
    folder = Workspace(workspace_of(config)).held_out_tasks(texts.fingerprint)
    if any(map(is_made_here, asked)):
        held_out_data(texts, folder)
    return folder


class StudentTasks:
    """The tasks of ``training.tasks``.

    Attributes:
        higher: every measure of them, TASK:METRIC, and whether more of it is better.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        """Loads the tasks, to know their measures before anything is trained.

        Args:
            config: the whole configuration.
            tokenizer: the model's; None: nothing will be measured.

        Raises:
            ValueError: lm-eval does not know a task, or a task lets the model write.
        """
        self._config, self._tokenizer = config, tokenizer
        names = config.training.tasks
        check_tasks(names, config.evaluate.task_dir, _WHERE)
        if tokenizer is not None and not _marks(tokenizer):
            raise ValueError(
                f"{_WHERE}: the tokenizer has neither a begin nor an end token, which lm-eval puts before a "
                "text; name one in tokenizer_config.json (eos_token), or leave the tasks out"
            )
        if tokenizer is not None and config.evaluate.chat:
            check_chat(Path(config.workspace), tokenizer)
        self._data = task_data(config, names)
        self.higher: dict[str, bool] = {}
        for name in names:
            for metric, better in _measures(name, config.evaluate.task_dir, self._data).items():
                self.higher[f"{name}:{metric}"] = better

    def measure(self, model: Any, task: str) -> dict[str, float]:
        """Measures a task on a model as it is now: TASK:METRIC to value, standard errors among them."""
        settings = self._config.evaluate
        found = run_task(
            model, self._tokenizer, task, settings.task_dir, self._data, self._config.training.task_limit,
            settings.batch_size, answers=Answers(chat=settings.chat), quiet=True,
        )  # fmt: skip
        return {f"{task}:{metric}": value for metric, value in found.metrics.items()}

    def named(self, asked: str, where: str) -> str:
        """The measure that TASK or TASK:METRIC asks for.

        Raises:
            ValueError: none of ``training.tasks`` has it.
        """
        if asked in self.higher:
            return asked
        own = [name for name in self.higher if name.rpartition(":")[0] == asked]
        if not own:
            there = ", ".join(self.higher) or "none"
            raise ValueError(
                f"{where}: expected a measure of training.tasks ({there}), found {asked!r}"
            )
        first = [f"{asked}:{metric}" for metric in ACCURACIES if f"{asked}:{metric}" in own]
        return [*first, *own][0]


def _marks(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None


def _measures(name: str, task_dir: str | None, data: Path) -> Mapping[str, bool]:
    """A task's measures, and whether more of each is better; of a group those that it averages."""
    task, _ = split_shots(name)
    made = task in MADE_HERE
    with unconnected(made):
        manager = manager_of(None) if made else manager_of(task_dir, task)
        found = manager.load([made_here(task, data) if made else task])
    parts = list(found["tasks"].values())
    if any(part.get_config("output_type") == "generate_until" for part in parts):
        raise ValueError(
            f"{_WHERE}: {name} lets the model write, which takes too long beside a training; name tasks of "
            "log-likelihoods (multiple choice), and this one in evaluate.tasks"
        )
    better: dict[str, bool] = {}
    for part in parts:
        better |= {metric: value is not False for metric, value in part.higher_is_better().items()}
    if task not in found["groups"]:
        return better
    averaged = [each.metric for each in found["groups"][task].aggregate_metric_list or []]
    return {metric: better[metric] for metric in averaged if metric in better}
