"""What decides the cache of a teacher's logits, for the stage that writes it and the one that reads it."""

from typing import Any

from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import held_out_sampling, sampling
from nemo_minitron.stages.vocabularies import kept_ids


def asked_for(config: Config) -> dict[str, Any]:
    """What of the configuration decides the cache, but for how many samples there are."""
    settings = config.distill.cache
    return {
        "method": settings.method, "entries": settings.entries, "temperature": config.distill.temperature,
        "seed": settings.seed if settings.method == "sampling" else None,
        "train": sampling(config.data.train), "validation": held_out_sampling(config),
        "dtype": config.distill.teacher_dtype,
    } | ({} if kept_ids(config) is None else {"outside": config.distill.outside})  # fmt: skip


def refuse_phases(config: Config) -> None:
    """Refuses a training in phases, for the cache holds samples of one text and one length.

    Raises:
        ValueError: it is one.
    """
    if config.training.phases:
        raise ValueError(
            "training.phases: not with distill.teacher_logits=cache, which holds samples of one text and one "
            "length; use online"
        )
