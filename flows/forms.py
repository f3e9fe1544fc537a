"""Parameters of the flows as forms, made of the documented keys of the configuration."""

from dataclasses import fields
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from nemo_minitron.compose import as_dict, from_dict, load_config
from nemo_minitron.stages.config import Config, PlanConfig
from nemo_minitron.stages.launch_config import LaunchConfig


def _form(name: str, section: type, text: str) -> type[BaseModel]:
    """A form of a section's plain keys; what is left empty stays as the configuration has it."""
    hints, entries = get_type_hints(section), {}
    for item in fields(section):
        kind: Any = hints[item.name]
        if item.metadata.get("help") is None:
            continue  # a section inside, or what only overrides reach
        if item.metadata["choices"]:
            kind = Literal[item.metadata["choices"]]
        bound = {} if item.metadata["least"] is None else {"ge": item.metadata["least"]}
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
