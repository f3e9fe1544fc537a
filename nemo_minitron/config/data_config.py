"""Keys of ``data``."""

from dataclasses import dataclass, field

from nemo_minitron.config.bounds import ANY_SEED, SHARE, Bounds
from nemo_minitron.config.option import option


@dataclass
class TextConfig:
    """One set of text."""

    paths: list[str] | None = option(
        None,
        "files, folders, glob patterns, hf://owner/name[@REV][/config][:split]; null: "
        "calibration reads data.train, validation what is held out of it",
    )
    exclude: list[str] = option([], "glob patterns of files to leave out")
    format: str = option(
        "auto", "auto goes by the file name", ("auto", "text", "jsonl", "parquet", "hf", "megatron")
    )
    text_key: str = option(
        "text",
        "column that holds the text, or a conversation (messages with role and content), in jsonl, parquet "
        "and hf",
    )
    sequence_length: int = option(
        1024,
        "tokens per sample; documents are packed end to end",
        bounds=Bounds(least=1, most=2**24),
    )
    samples: int | None = option(
        None, "samples to take; null: as many as are needed, of validation 512", least=1
    )
    seed: int = option(0, "seed of the order in which files and samples are taken", bounds=ANY_SEED)


@dataclass
class CalibrationConfig(TextConfig):
    """Text for scoring."""

    samples: int | None = option(1024, "samples to take; null: all of them", least=1)
    weights: list[float] | None = option(
        None,
        "shares of the samples, one for each entry of paths; null: all text is one pool",
        least=0,
    )
    packing: str = option(
        "plain",
        "plain: documents end to end, as in the papers; documents: the same, but attention and positions "
        "start over with each document; off: one document per sample, cut or padded",
        ("plain", "documents", "off"),
    )


@dataclass
class TrainConfig(TextConfig):
    """Text for training; its tokens lie in the workspace's tokens/, made once for all stages."""

    weights: list[float] | None = option(
        None,
        "shares of the samples, one for each entry of paths; null: all text is one pool",
        least=0,
    )
    learn_from: str = option(
        "all",
        "which tokens count in the loss: all, or answers: of a conversation only what the assistant says",
        ("all", "answers"),
    )


@dataclass
class DataConfig:
    """Text for scoring, training and measuring."""

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: TextConfig = field(default_factory=TextConfig)
    holdout: float = option(
        0.05,
        "share of data.train's documents kept out of training, for validation without paths of its own",
        bounds=SHARE,
    )
