"""correct: teacher correction, training of the unpruned model on the distillation data ([P2] section 2)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.stages.inputs import source_folder
from nemo_minitron.stages.recipe import Recipe
from nemo_minitron.stages.training_stage import Role, tokenizer_of, training_inputs, training_recipe
from nemo_minitron.workspace.layout import Workspace


def recipe(config: Config) -> Recipe:
    """Trains the source model on with cross-entropy.

    The result takes its place as teacher and as what is pruned.
    """
    source, item = source_folder(config)
    workspace = Workspace(workspace_of(config))

    def start() -> tuple[Any, dict[str, Any], Path]:
        import torch

        from nemo_minitron.models.causal_lm import load_model

        return load_model(source, dtype=torch.float32), read_config(source), source

    def callbacks() -> list[Any]:
        from nemo_minitron.plugin.live_teacher import Publishing

        every = config.correct.publish_every
        return [] if every is None else [Publishing(workspace.live, every)]

    inputs = [item, *training_inputs(config)]
    role = Role(lambda: tokenizer_of(source), start, lambda: read_config(source), callbacks)
    section = {**asdict(config.correct), "publish_every": None}  # decides nothing
    return training_recipe(workspace.correct, "correct", config, section, inputs, role)
