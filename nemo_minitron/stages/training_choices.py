"""``training.tasks`` and ``training.keep``: what a training is watched by, and which weights it ends with."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import VALIDATION_SAMPLES, held_out_sampling

if TYPE_CHECKING:
    from nemo_minitron.evaluation.student_tasks import StudentTasks

_LAST, _LOSS, _BEST = "last", "best:loss", "best:"


def decides(config: Config, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which weights become the result, for fingerprints; nothing where the last do."""
    keep = config.training.keep
    if keep == _LAST:
        return {}
    looks = {"validation": held_out_sampling(config, VALIDATION_SAMPLES), **_rhythm(trainer)}
    on_task = {} if keep == _LOSS else _task_settings(config)
    return {"keep": {"measure": keep, **looks, **on_task}}


def stops_on_task(config: Config) -> dict[str, Any]:
    """What decides where early stopping on a task ends a training, for fingerprints; nothing without one."""
    manager = config.exp_manager
    watched = (manager.get("early_stopping_callback_params") or {}).get("monitor") or ""
    stops = manager.get("create_early_stopping_callback") and ":" in watched
    return {"tasks": _task_settings(config)} if stops else {}


def _rhythm(trainer: Mapping[str, Any]) -> dict[str, Any]:
    every = trainer.get("val_check_interval")
    if isinstance(every, int):  # in steps, however many micro-batches make one
        every = every / (trainer.get("accumulate_grad_batches") or 1)
    return {"every": every, "limit_val_batches": trainer.get("limit_val_batches")}


def _task_settings(config: Config) -> dict[str, Any]:
    from nemo_minitron.evaluation.task_files import task_print

    settings = config.training
    return {
        "tasks": {name: task_print(name, config.evaluate.task_dir) for name in settings.tasks},
        "task_every": settings.task_every,
        "task_limit": settings.task_limit,
        **({"chat": True} if config.evaluate.chat else {}),
    }


def check_choices(config: Config, trainer: Mapping[str, Any]) -> dict[str, bool]:
    """Refuses what could not be measured or kept, before anything is trained.

    Returns:
        The measures of ``training.tasks``, and whether more of each is better.

    Raises:
        ValueError: an unknown task or measure, weights that are in parts, or no validation to choose by.
    """
    settings = config.training
    named = "tasks" if settings.tasks else "keep"
    if settings.keep != _LAST and not settings.keep.startswith(_BEST):
        raise ValueError(
            f"training.keep: expected last, best:loss or best:TASK, found {settings.keep!r}"
        )
    if not settings.tasks and settings.keep == _LAST:
        return {}
    if settings.parallel == "shard":
        raise ValueError(
            f"training.{named}: not with training.parallel=shard, whose weights are in parts"
        )
    _check_rhythm(config, trainer, f"training.{named}")
    tasks = _tasks(config, None)
    _kept_measure(config, tasks)
    return {} if tasks is None else tasks.higher


def _check_rhythm(config: Config, trainer: Mapping[str, Any], where: str) -> None:
    """Refuses a training without a validation, or without one at which its tasks are measured.

    Raises:
        ValueError: it is one.
    """
    every = _rhythm(trainer)["every"]
    between = config.training.task_every if config.training.tasks else 1
    steps = trainer["max_steps"]
    if trainer.get("limit_val_batches") == 0:
        raise ValueError(f"{where}: this training has no validation (trainer.limit_val_batches=0)")
    if isinstance(every, float) and isinstance(steps, int) and every * between > steps:
        raise ValueError(
            f"{where}: measured after {every * between:g} steps for the first time, and this training ends "
            f"after {steps} (training.validate_every, training.task_every)"
        )


def check_stopping(manager: Mapping[str, Any], higher: Mapping[str, bool]) -> None:
    """Refuses early stopping that takes the better values of a task for the worse ones.

    Raises:
        ValueError: its ``mode`` says so; Lightning's is ``min`` where none is given.
    """
    settings = manager.get("early_stopping_callback_params") or {}
    measure, mode = settings.get("monitor"), settings.get("mode") or "min"
    if manager.get("create_early_stopping_callback") and measure in higher:
        right = "max" if higher[measure] else "min"
        if mode != right:
            raise ValueError(
                f"exp_manager.early_stopping_callback_params.mode: {measure} is better where it is "
                f"{'higher' if right == 'max' else 'lower'}; expected {right}, found {mode}"
            )


def _tasks(config: Config, tokenizer: Any) -> "StudentTasks | None":
    if not config.training.tasks:
        return None
    from nemo_minitron.evaluation.student_tasks import StudentTasks

    return StudentTasks(config, tokenizer)


def _kept_measure(config: Config, tasks: "StudentTasks | None") -> tuple[str, bool] | None:
    """The measure by which weights are kept, and whether more of it is better; None: the last ones are.

    Raises:
        ValueError: no task has it.
    """
    keep, where = config.training.keep, "training.keep"
    if keep == _LAST:
        return None
    if keep == _LOSS:
        return "val_loss", False
    asked = keep.removeprefix(_BEST)
    if tasks is None:
        raise ValueError(
            f"{where}: expected a measure of training.tasks (none), found {asked!r}; name the task there"
        )
    measure = tasks.named(asked, where)
    return measure, tasks.higher[measure]


def watching(config: Config, tokenizer: Any, state: Path) -> list[Any]:
    """The callbacks that measure tasks and keep the best weights; they come before all others that look.

    Args:
        config: the whole configuration.
        tokenizer: the model's.
        state: folder of the training's state.
    """
    tasks = _tasks(config, tokenizer)
    measure = _kept_measure(config, tasks)
    made: list[Any] = []
    if tasks is not None:
        from nemo_minitron.training.task_curves import TaskCurves

        settings = config.training
        made.append(TaskCurves(tasks.measure, settings.tasks, settings.task_every))
    if measure is not None:
        from nemo_minitron.training.best_weights import BestWeights

        made.append(BestWeights(*measure, state))
    return made
