"""pretrain: a small model from random weights.

A teacher of one's own, or the baseline of the student's shape.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.data.mixtures import training_text
from nemo_minitron.stages.recipe import Recipe
from nemo_minitron.stages.training_stage import Role, tokenizer_of, training_inputs, training_recipe
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace, state_in
from nemo_minitron.workspace.manifest import Input

TOKENIZER = "tokenizer"


def recipe(config: Config) -> Recipe:
    """Trains from random weights.

    With ``pretrain.baseline`` the model has the pruned model's config.json, and sees as many tokens
    as the student; otherwise it has ``pretrain.model``, and a byte-level BPE is trained first
    unless ``pretrain.tokenizer`` names one.

    Raises:
        ValueError: no model is described, or its family or config is refused.
    """
    return _baseline(config) if config.pretrain.baseline else _teacher(config)


def _teacher(config: Config) -> Recipe:
    folder = Workspace(workspace_of(config)).pretrain
    shape = dict(config.pretrain.model)
    if "model_type" not in shape or "vocab_size" not in shape:
        raise ValueError(
            "pretrain.model: model_type and vocab_size are needed, as in a config.json"
        )
    section = asdict(config.pretrain)
    given = config.pretrain.tokenizer
    files = state_in(folder) / TOKENIZER if given is None else Path(given)

    def prepare() -> None:
        if not (files / "tokenizer.json").is_file() and given is None:
            from nemo_minitron.data.documents import documents, plain
            from nemo_minitron.data.tokenizer import train_tokenizer

            files.mkdir(exist_ok=True)
            train_tokenizer(plain(documents(training_text(config))), shape["vocab_size"], files)

    def start() -> tuple[Any, dict[str, Any], Path]:
        from nemo_minitron.models.causal_lm import new_model, stored_config

        model = new_model(shape, config.pretrain.seed)
        return model, stored_config(model, shape), files

    def tokenizer() -> Any:
        from nemo_minitron.models.causal_lm import load_tokenizer

        return load_tokenizer(files, shape["vocab_size"])

    role = Role(tokenizer, start, lambda: shape, prepare=prepare)
    inputs = training_inputs(config)
    if given is not None:
        inputs.append(Input(given, tokenizer_fingerprint(files)))
    return training_recipe(folder, "pretrain", config, section, inputs, role)


def _baseline(config: Config) -> Recipe:
    workspace = Workspace(workspace_of(config))
    pruned = workspace.pruned
    section = {
        **asdict(config.pretrain),
        "batch_size": config.distill.batch_size,
        "trainer": {},  # the student's steps and rhythm
        "model": {},
    }
    inputs = [input_artifact(workspace.root, "pruned", "prune"), *training_inputs(config)]

    def start() -> tuple[Any, dict[str, Any], Path]:
        from nemo_minitron.models.causal_lm import new_model

        hf_config = read_config(pruned)
        return new_model(hf_config, config.pretrain.seed), hf_config, pruned

    role = Role(lambda: tokenizer_of(pruned), start, lambda: read_config(pruned))
    return training_recipe(workspace.scratch, "scratch", config, section, inputs, role)
