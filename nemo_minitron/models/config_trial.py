"""transformers: tries a config.json on the class that would read it, before anything is cut or trained."""

from collections.abc import Mapping
from typing import Any

import transformers

from nemo_minitron.security.plain_text import plain


def check_config_loads(config: Mapping[str, Any], where: str) -> None:
    """Builds transformers' own configuration object.

    Args:
        config: a config.json.
        where: what an error message calls it.

    Raises:
        ValueError: transformers refuses it; the message holds the reason in full.
    """
    entries = {key: value for key, value in config.items() if key != "model_type"}
    try:
        transformers.AutoConfig.for_model(config["model_type"], **entries)
    except Exception as error:  # transformers raises whatever its validators raise
        raise ValueError(
            f"{where}: transformers {transformers.__version__} would not load the result: "
            f"{plain(error, 400)}"
        ) from error
