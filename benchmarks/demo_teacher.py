"""The demo's teacher, one per seed, and the loss of a model folder: what several benchmarks begin with."""

from pathlib import Path

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import load_config
from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import validation_samples
from nemo_minitron.evaluation.held_out_loss import held_out_loss
from nemo_minitron.models.causal_lm import frozen, load_model, load_tokenizer
from nemo_minitron.stages.run import run_stage

ROOT = Path("runs/teachers")


def teacher(seed: int, extra: list[str]) -> Config:
    """Trains the teacher of a seed, unless it is there."""
    config = load_config(
        "demo", [f"workspace={ROOT}/teacher-{seed}", f"pretrain.seed={seed}", *extra]
    )
    run_stage("pretrain", config)
    return config


def loss(config: Config, folder: Path) -> float:
    """Held-out loss of a model in nats per token, on the text of a configuration."""
    checkpoint = open_checkpoint(folder)
    with frozen(load_model(folder)) as model:
        return held_out_loss(
            model, checkpoint.family, validation_samples(config, load_tokenizer(folder)), 8
        )
