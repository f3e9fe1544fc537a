"""Keys of ``correct``."""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.bounds import ANY_SEED, Bounds
from nemo_minitron.config.option import option


@dataclass
class CorrectConfig:
    """Teacher correction: the unpruned model is trained on the distillation data ([P2] section 2)."""

    enabled: bool = option(False, "whether 'minitron run' corrects the teacher before scoring it")
    publish_every: int | None = option(
        None, "steps after which the weights are put into live/, for distill.live_teacher", least=1
    )
    batch_size: int = option(8, "samples per step and device", bounds=Bounds(least=1, most=16_384))
    seed: int = option(1, "seed of the sample order", bounds=ANY_SEED)
    trainer: dict[str, Any] = option({}, "keys that replace those of trainer")
    optim: dict[str, Any] = option({}, "keys that replace those of optim")
