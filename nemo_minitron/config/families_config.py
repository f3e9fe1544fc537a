"""Keys of ``families``."""

from dataclasses import dataclass

from nemo_minitron.config.option import option


@dataclass
class FamiliesConfig:
    """Family tables."""

    path: str | None = option(
        None, "table of your own (.yaml, docs/families.md), or a folder of them"
    )
