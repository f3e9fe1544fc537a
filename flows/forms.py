"""Parameters of the flows as forms, made of the documented keys of the configuration."""

import re
from dataclasses import fields
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from nemo_minitron.config.compose import as_dict, from_dict, load_config
from nemo_minitron.config.config import Config
from nemo_minitron.config.launch_config import LaunchConfig
from nemo_minitron.config.plan_config import PlanConfig


def _form(name: str, section: type, text: str) -> type[BaseModel]:
    """A form of a section's plain keys; what is left empty stays as the configuration has it."""
    hints, entries = get_type_hints(section), {}
    for item in fields(section):
        kind: Any = hints[item.name]
        if item.metadata.get("help") is None:
            continue  # a section inside, or what only overrides reach
        if item.metadata["choices"]:
            kind = Literal[item.metadata["choices"]]
        bounds = item.metadata["bounds"]
        limits = {"ge": bounds.least, "gt": bounds.above, "le": bounds.most, "lt": bounds.below}
        single = not any(kind in str(hints[item.name]) for kind in ("list", "dict"))
        bound = {name: limit for name, limit in limits.items() if single and limit is not None}
        entries[item.name] = (kind | None, Field(None, description=item.metadata["help"], **bound))
    made: type[BaseModel] = create_model(
        name, __config__=ConfigDict(extra="forbid"), __doc__=text, __module__=__name__, **entries
    )  # type: ignore[call-overload]
    return made


Sizes = _form("Sizes", PlanConfig, "Target sizes; what is left empty keeps its size.")
Launch = _form("Launch", LaunchConfig, "Where stages run, and what they are allowed.")


def composed(
    config_name: str,
    overrides: list[str] | None,
    workspace: str | None = None,
    model: str | None = None,
    data: list[str] | None = None,
    plan: BaseModel | None = None,
    launch: BaseModel | None = None,
) -> Config:
    """A configuration with what the form's fields say in place of its own values.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range.
    """
    values = as_dict(load_config(config_name, overrides or []))
    if workspace is not None:
        values["workspace"] = workspace
    if model is not None:
        values["source"]["model"] = model
    if data is not None:
        values["data"]["train"]["paths"] = data
    for section, form in (("plan", plan), ("launch", launch)):
        if form is not None:
            values[section] |= form.model_dump(exclude_none=True)
    return from_dict(values)


def cli_words(
    config_name: str,
    overrides: list[str] | None,
    workspace: str | None = None,
    model: str | None = None,
    data: list[str] | None = None,
    plan: BaseModel | None = None,
    launch: BaseModel | None = None,
    **more: str | list[str] | None,
) -> list[str]:
    """The command line that composes the same configuration, behind the command's name.

    Args:
        config_name: configuration to start from.
        overrides: in Hydra's grammar.
        workspace: folder of the run.
        model: hub id or folder of the model to compress.
        data: text to train on.
        plan: target sizes, as a form.
        launch: where stages run, as a form.
        **more: further keys with their values, ``__`` in place of dots; None: not set.
    """
    values: dict[str, Any] = {
        "workspace": workspace,
        "source.model": model,
        "data.train.paths": data,
    }
    values |= {name.replace("__", "."): value for name, value in more.items()}
    for section, form in (("plan", plan), ("launch", launch)):
        if form is not None:
            values |= {
                f"{section}.{name}": value
                for name, value in form.model_dump(exclude_none=True).items()
            }
    given = [f"{name}={_in_grammar(value)}" for name, value in values.items() if value is not None]
    named = [] if config_name == "config" else ["--config-name", config_name]
    return [*named, *(overrides or []), *given]


def _in_grammar(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if isinstance(value, list):
        return f"[{','.join(map(_in_grammar, value))}]"
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    plain = re.fullmatch(r"(\.{0,2}/|[A-Za-z])[\w./-]*", value)
    if plain and value.lower() not in ("true", "false", "null", "nan", "inf"):
        return value
    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{quoted}'"
