"""transformers: tries a config.json on the class that would read it, before anything is cut or trained."""

import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers

from nemo_minitron.security.plain_text import plain


def config_object(config: Mapping[str, Any]) -> Any:
    """What transformers makes of a config.json, read from a file as a model's is."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


def reason(error: Exception) -> str:
    """What a library says of a config.json, on one line, without the names that only Python knows."""
    # a KeyError's own text is its message in quotes
    given = error.args[0] if isinstance(error, KeyError) and error.args else error
    said = re.sub(r"\b[A-Z]\w*(Error|Exception): ", "", str(given))
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", said).replace("NoneType", "null")
    said = re.sub(
        r"'(\w+)' object has no attribute '[^']*'", r"a value of type \1 does not fit", said
    )
    said = re.sub(r"module '([\w.]+)' has no attribute '([^']*)'", r"\1 has no '\2'", said)
    return plain(said, 400) or type(error).__name__


_PYTHON = re.compile(
    r"object (has|is|does|cannot)|has no (attribute|setter)|not supported between|update sequence"
    r"|unexpected keyword|invalid data type|indices must be"
)


def culprit(
    settings: Mapping[str, Any], works: Callable[[dict[str, Any]], bool], error: Exception
) -> str | None:
    """The key without which settings work, its value, and why where that is more than Python's own words.

    Args:
        settings: what fails.
        works: tries other settings.
        error: the failure.

    Returns:
        None where the fault is not that of one key.
    """
    for key, value in itertools.islice(settings.items(), _TRIED):
        if works({other: settings[other] for other in settings if other != key}):
            why = reason(error)
            said = "" if _PYTHON.search(why) else f": {why}"
            return f"{plain(key, 80)}={plain(json.dumps(value), 80)}{said}"
    return None


_TRIED = 100
"""Keys that are tried; real files have some fifty."""


def check_config_loads(config: Mapping[str, Any], where: str) -> None:
    """Builds transformers' own configuration object.

    Args:
        config: a config.json.
        where: what an error message calls it.

    Raises:
        ValueError: transformers refuses it; the message holds the reason in full.
    """
    try:
        config_object(config)
    except Exception as error:  # transformers raises whatever its validators raise
        raise ValueError(
            f"{where}: transformers {transformers.__version__} would not load the result: "
            f"{reason(error)}"
        ) from error


def not_built(
    folder: Path,
    config: Mapping[str, Any],
    error: Exception,
    builds: Callable[[dict[str, Any]], bool] | None = None,
) -> ValueError:
    """What to tell of a model that transformers cannot build: file, and key where one is at fault.

    Args:
        folder: the model.
        config: its config.json.
        error: transformers' own.
        builds: tries another config; None: the key is the one whose value the error names.
    """
    version = f"transformers {transformers.__version__}"
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    words = [
        (f"{plain(key, 80)}={plain(value, 80)!r}", value)
        for key, value in _entries(config)
        if isinstance(value, str) and len(value) > 1
    ]
    if isinstance(error, KeyError) and (unknown := [key for key, word in words if word == said]):
        return ValueError(f"{folder / 'config.json'}: {unknown[0]} is unknown to {version}")
    if builds is not None and (key := culprit(config, builds, error)) is not None:
        return ValueError(f"{folder / 'config.json'}: {version} cannot build this model with {key}")
    keys = [key for key, word in words if repr(word) in said]
    named = f" ({keys[0]})" if keys else ""
    return ValueError(
        f"{folder / 'config.json'}: {version} cannot build this model{named}: {reason(error)}"
    )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a configuration, at any depth."""
    waiting: list[Any] = [config]
    while waiting:  # not by recursion: a stranger's file may be nested deeply
        for key, value in waiting.pop().items():
            yield str(key), value
            if isinstance(value, Mapping):
                waiting.append(value)
