"""Keys of ``prune``."""

from dataclasses import dataclass

from nemo_minitron.config.option import option


@dataclass
class PruneConfig:
    """How the pruned checkpoint is written."""

    shard_size: int = option(5_000_000_000, "largest shard in bytes", least=1)
    also: list[str] = option(
        [],
        "further workspaces with a plan for the same model: pruned in the same pass over its weights",
    )
