"""How ranks share a training, and what of Lightning's strategies does not go with it."""

from typing import Any

NAMED = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
"""Names of Lightning's strategies that a stage hands on: torchrun starts the ranks, and each has the whole
model."""

OTHERS = (
    "ddp_fork", "ddp_notebook", "ddp_spawn", "deepspeed", "fsdp", "single_device", "single_tpu", "single_xla",
    "xla",
)  # fmt: skip
"""How Lightning's other names begin: of models in parts, of ranks that it starts itself, and of one alone."""


def check_named(section: str, strategy: Any) -> None:
    """Refuses the names of Lightning's strategies that leave rank 0 without the whole trained model.

    A name that is not Lightning's is that of another package, for its own accelerator.

    Args:
        section: such as ``trainer``.
        strategy: its ``strategy``; what is no text is not looked at.

    Raises:
        ValueError: it is such a name.
    """
    if isinstance(strategy, str) and strategy not in NAMED and strategy.startswith(OTHERS):
        raise ValueError(
            f"{section}.strategy: expected one of {', '.join(NAMED)}, found {strategy!r}; to split the model "
            "over the ranks (FSDP2) use training.parallel=shard, and torchrun to start them"
        )


def check_tensor_parallel(parts: int, shard: bool) -> None:
    """Refuses tensor parallelism of a model that every rank has a copy of: it would only be counted with.

    Args:
        parts: ``training.tensor_parallel``.
        shard: whether ``training.parallel`` is ``shard``.

    Raises:
        ValueError: more than one part, and no model that is split.
    """
    if parts > 1 and not shard:
        raise ValueError(
            f"training.tensor_parallel={parts}: splits the layers of a model only with "
            "training.parallel=shard; add it, or leave training.tensor_parallel out"
        )


def check_shard(section: str, strategy: Any) -> None:
    """Refuses a strategy beside ``training.parallel=shard``.

    Args:
        section: such as ``trainer``.
        strategy: its ``strategy``.

    Raises:
        ValueError: there is one.
    """
    if strategy not in (None, "auto"):
        raise ValueError(
            f"{section}.strategy: training.parallel=shard is a strategy itself; use auto, or "
            f"training.parallel=replicate (found {strategy!r})"
        )
