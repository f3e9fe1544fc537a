"""Which parameters of a model train: by patterns of their names, and by words that a family's table knows."""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from nemo_minitron.families import Family
from nemo_minitron.security.plain_text import plain

ROUTER = "router"
"""The word for what decides to which experts a token goes; ``modules.router`` of a table says where it is."""


def chosen(
    names: Sequence[str], family: Family, only: Sequence[str], where: str = "training.only"
) -> set[str]:
    """The parameters that patterns choose.

    Args:
        names: those of a model, as ``named_parameters`` has them; tied ones under each of their names.
        family: the model's table.
        only: patterns in which ``*`` stands for anything and ``?`` for one character, or ``router``.
        where: what an error message calls the patterns.

    Raises:
        ValueError: a pattern chooses nothing; the message names it, and parameters that there are.
    """
    found: set[str] = set()
    for pattern in only:
        matches = [name for name in names if _regex(pattern, family, where).fullmatch(name)]
        if not matches:
            raise ValueError(f"{where}: {plain(pattern, 80)}: {_nothing(pattern, names)}")
        found |= set(matches)
    return found


def _regex(pattern: str, family: Family, where: str) -> re.Pattern[str]:
    if pattern != ROUTER:
        return re.compile(fnmatch.translate(pattern))
    if ROUTER not in family.modules:
        raise ValueError(
            f"{where}: router: the table of {family.model_type} names none; give patterns of names of "
            "parameters, as '*.mlp.gate.weight'"
        )
    before, placeholder, behind = family.modules[ROUTER].partition(f"{{{family.layer}}}")
    return re.compile(
        re.escape(before) + (r"\d+" if placeholder else "") + re.escape(behind) + r"\..+"
    )


def _nothing(pattern: str, names: Sequence[str]) -> str:
    if pattern == ROUTER:
        return "this model has no layer with routed experts"
    near = difflib.get_close_matches(pattern, names, 3, 0.3) or names[:3]
    shown = ", ".join(plain(name, 120) for name in near)
    return f"no parameter of the model has such a name; there are {shown}"


def train_only(
    model: Any, family: Family, only: Sequence[str], where: str = "training.only"
) -> None:
    """Freezes all parameters of a model but those that patterns choose; see ``chosen``.

    What is frozen already stays so.

    Raises:
        ValueError: a pattern chooses nothing.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    names = chosen(list(every), family, only, where)
    trained = {id(every[name]) for name in names}
    for parameter in every.values():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def check_only(
    config: Mapping[str, Any], family: Family, only: Sequence[str], where: str = "training.only"
) -> None:
    """Refuses patterns that choose nothing of a model that is not there yet.

    Args:
        config: its config.json, which transformers admits.
        family: its table.
        only: the patterns.
        where: what an error message calls them.

    Raises:
        ValueError: one chooses nothing.
    """
    entries = {key: value for key, value in config.items() if key != "model_type"}
    settings = transformers.AutoConfig.for_model(config["model_type"], **entries)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    chosen(names_of(model), family, only, where)


def names_of(model: Any) -> list[str]:
    """Names of a model's parameters; tied ones under each of their names."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def described(model: Any) -> str:
    """How many of a model's parameters train, in words."""
    every = list(model.parameters())
    training = sum(one.numel() for one in every if one.requires_grad)
    return f"{training:,} of {sum(one.numel() for one in every):,} parameters train"
