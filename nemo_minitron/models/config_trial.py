"""transformers: tries a config.json on the class that would read it, before anything is cut or trained."""

import json
import re
import tempfile
from collections.abc import Mapping
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
    said = re.sub(r"\b[A-Z]\w*(Error|Exception): ", "", str(error))
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", said).replace("NoneType", "null")
    return plain(said, 400)


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
