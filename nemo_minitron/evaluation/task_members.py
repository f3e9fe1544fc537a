"""lm-eval's tasks and groups as their YAML files describe them, before anything is loaded or asked."""

from collections.abc import Iterator, Mapping
from typing import Any


def refuse_what_is_not_done(manager: Any, task: str, shots: int | None, where: str) -> None:
    """Refuses what lm-eval would run otherwise than it is asked, or run without giving a number.

    lm-eval 0.4.13 leaves ``num_fewshot: 0`` of a task's YAML as it is, whatever is asked for
    (``evaluator.simple_evaluate``), and gives a group a number only by its ``aggregate_metric_list``.

    Args:
        manager: lm-eval's ``TaskManager``, which knows the task.
        task: its name.
        shots: examples before each question; None: as its YAML says.
        where: the key that names it.

    Raises:
        ValueError: the number of examples would be ignored; the group has no number of its own.
    """
    config = manager.task_index[task].cfg or {}
    if isinstance(config.get("task"), list) and not config.get("aggregate_metric_list"):
        raise ValueError(
            f"{where}: {task!r} is a group without a number of its own (aggregate_metric_list); name its "
            f"tasks: {', '.join(_named(member) for member in config['task'])}"
        )
    members = _leaves(manager.task_index, task, None)
    fixed = [name for name, own in members if own == 0] if shots else []
    if fixed:
        of = "" if fixed == [task] else f" of {fixed[0]}"
        raise ValueError(
            f"{where}: {task}@{shots}: the YAML{of} says num_fewshot: 0, which lm-eval never changes; leave "
            f"@{shots} out"
        )


def _leaves(
    index: Mapping[str, Any], item: str | Mapping[str, Any], shots: int | None
) -> Iterator[tuple[str, int | None]]:
    """The single tasks of a group's member, each with the examples that it has by itself.

    Args:
        index: lm-eval's entries by name.
        item: a member as a group's YAML names it.
        shots: ``num_fewshot`` of the groups around it; None: they say none.
    """
    given = {} if isinstance(item, str) else item
    name = item if isinstance(item, str) else item.get("group", item.get("task"))
    shots = given.get("num_fewshot", shots)
    entry = index.get(name) if isinstance(name, str) else None
    config = given if entry is None else entry.cfg or {}
    shots = config.get("num_fewshot") if shots is None else shots
    members = config["task"] if isinstance(config.get("task"), list) else []
    if entry is not None and entry.kind.name == "TAG":
        members = sorted(entry.tags)
    for member in members:
        yield from _leaves(index, member, shots)
    if not members:
        yield str(name), shots


def _named(member: str | Mapping[str, Any]) -> str:
    """A group's member as ``evaluate.tasks`` would name it."""
    if isinstance(member, str):
        return member
    name, shots = member.get("group", member.get("task")), member.get("num_fewshot")
    return str(name) if shots is None else f"{name}@{shots}"
