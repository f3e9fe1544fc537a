"""Files that an lm-eval task is made of; a measurement is valid as long as they are unchanged."""

import contextlib
import glob
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.evaluation.held_out_tasks import MADE_HERE, split_shots
from nemo_minitron.evaluation.lm_eval import library, manager_of
from nemo_minitron.workspace.manifest import digest, hash_file


def task_print(name: str, task_dir: str | None) -> dict[str, str | None]:
    """What decides a task's questions: lm-eval's version, and a YAML that is not its own.

    With the YAML counts what it includes, the Python files beside it where it names a function, the
    data that it names where they lie here, and for a group the same of its tasks.
    """
    task, _ = split_shots(name)
    own: set[Path] = (
        set() if task in MADE_HERE else _files_of(task, manager_of(task_dir, task).task_index)
    )
    prints = [[path.name, hash_file(path)] for path in sorted(own)]
    return {"lm_eval": version("lm_eval"), "own": digest(prints) if prints else None}


def _files_of(task: str, index: Any) -> set[Path]:
    entry = index.get(task)
    theirs = Path(library().__file__).resolve().parent  # an environment may be reached by a link
    if (
        entry is None
        or entry.yaml_path is None
        or Path(entry.yaml_path).resolve().is_relative_to(theirs)
    ):
        return set()
    found, config = _named_in(Path(entry.yaml_path).resolve())
    if "group" in config:
        for member in set(_strings(config.get("task"))) - {task}:
            found |= _files_of(member, index)
    return found


class _Unresolved(yaml.SafeLoader):
    """A YAML loader that keeps functions as names."""


_Unresolved.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def _named_in(path: Path) -> tuple[set[Path], dict[str, Any]]:
    """Files that a task's YAML consists of, and what it says without its includes."""
    text = path.read_text(encoding="utf-8")
    config, found = yaml.load(text, _Unresolved) or {}, {path}  # noqa: S506 (a SafeLoader, see above)
    for include in _strings(config.get("include")):
        included = path.parent / include
        if included.is_file() and included != path:
            found |= _named_in(included)[0]
    if "!function" in text or "class" in config:
        found |= set(path.parent.rglob("*.py"))
    for name in _strings([config.get("dataset_path"), config.get("dataset_kwargs")]):
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            there = [Path(name)] if Path(name).exists() else map(Path, glob.glob(name))
            found |= {
                file
                for at in there
                for file in ([at] if at.is_file() else at.rglob("*"))
                if file.is_file()
            }
    return found, config


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
