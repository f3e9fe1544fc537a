"""Keys of ``source``."""

from dataclasses import dataclass

from nemo_minitron.config.option import option


@dataclass
class SourceConfig:
    """The model to compress."""

    model: str | None = option(
        None,
        "hub id, local folder, GGUF file, or .nemo archive (of this package) of the model to compress",
    )
    revision: str | None = option(
        None,
        "hub revision; a workspace stays with the commit that it stood for when the workspace began",
    )
