"""Keys of ``pretrain``."""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.bounds import ANY_SEED, Bounds
from nemo_minitron.config.option import option


@dataclass
class PretrainConfig:
    """Training from random weights: a small teacher, or the baseline of the student's shape."""

    enabled: bool = option(False, "whether 'minitron run' begins by training its own teacher")
    baseline: bool = option(
        False, "train the from-scratch baseline: the pruned model's shape on the student's tokens"
    )
    model: dict[str, Any] = option({}, "config.json of the model to train, as its family writes it")
    tokenizer: str | None = option(
        None, "folder of a tokenizer; null: train a byte-level BPE on data.train"
    )
    batch_size: int = option(8, "samples per step and device", bounds=Bounds(least=1, most=16_384))
    seed: int = option(0, "seed of the weights and the sample order", bounds=ANY_SEED)
    trainer: dict[str, Any] = option({}, "keys that replace those of trainer")
    optim: dict[str, Any] = option({}, "keys that replace those of optim")
