"""What the three training stages have in common: their text, their recipe, and the model they write."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import log
from nemo_minitron.artifacts.build import make_resumable
from nemo_minitron.artifacts.manifest import Input
from nemo_minitron.stages import follows
from nemo_minitron.stages.config import Config
from nemo_minitron.stages.stage import (
    deciding,
    merged,
    sampling,
    text_input,
    training_text,
    validation_samples,
    validation_text,
)


@dataclass(frozen=True)
class Role:
    """What makes a training pretraining, correction or distillation; called only where one is due.

    Attributes:
        tokenizer: gives the tokenizer that packs the text; called after ``prepare``.
        start: gives the model to train, its config.json, and the folder whose side files it carries on.
        callbacks: gives the Lightning callbacks.
        prepare: called first.
    """

    tokenizer: Callable[[], Any]
    start: Callable[[], tuple[Any, dict[str, Any], Path | None]]
    callbacks: Callable[[], list[Any]] = list
    prepare: Callable[[], None] = lambda: None


_DECIDING = ("ema",)
"""What of exp_manager decides the weights; the rest only logs and saves."""


def training_inputs(config: Config) -> list[Input]:
    """Training and validation text as inputs."""
    return [text_input(training_text(config)), text_input(validation_text(config))]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from nemo_minitron.bridge.models import load_tokenizer

    return load_tokenizer(folder)


def train_into(
    folder: Path, kind: str, config: Config, section: Mapping[str, Any], inputs: Sequence[Input], role: Role
) -> bool:
    """Trains a model and writes it as an artifact: ``hf/`` and ``metrics.jsonl``.

    Args:
        folder: the artifact's folder.
        kind: its kind.
        config: the whole configuration.
        section: the stage's own keys: ``batch_size``, ``seed``, ``trainer``, ``optim`` and what else decides.
        inputs: what it is made from.
        role: the rest.

    Returns:
        Whether it had to be trained.
    """
    resolved, decides = _resolved(config, section)
    trainer = resolved["trainer"]
    accelerator = str(trainer["accelerator"]) if "accelerator" in trainer else "auto"
    if follows():
        return _follow(config, resolved, role, accelerator)
    ranks = _ranks(accelerator)
    begun = False

    def build(state: Path, target: Path) -> None:
        """Trains, the other ranks along with it, and writes what came of it."""
        nonlocal begun
        from nemo_minitron.plugin.training import check_trainer  # NeMo's import takes seconds: only where due

        check_trainer(trainer)
        role.prepare()
        begun = True
        ranks.broadcast(state)
        trained = _train(config, resolved, role, state)
        (target / "hf").mkdir()
        trained.save_hf(target / "hf")
        (target / log.FILE).write_bytes((state / log.FILE).read_bytes())

    made = make_resumable(folder, kind, decides, inputs, build)
    if not begun:
        ranks.broadcast(None)
    ranks.broadcast(made)  # the others wait until the artifact is whole
    return made


def _resolved(config: Config, section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage's keys with trainer and optimiser filled in, and what of them decides the weights."""
    trainer = {**merged(config.trainer, section["trainer"]), **_launched()}
    optim = merged(config.optim, section["optim"])
    resolved = {
        **{key: section[key] for key in section if key not in ("enabled", "baseline")},
        "trainer": trainer,
        "optim": optim,
    }
    decides = {
        **resolved,
        "trainer": deciding(trainer),
        "exp_manager": {key: config.exp_manager[key] for key in _DECIDING if key in config.exp_manager},
        "train": sampling(config.data.train),
    }
    return resolved, decides


def _launched() -> dict[str, Any]:
    """What torchrun's environment says of devices, for Lightning, which wants to hear it too."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return {}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    return {"devices": local, "num_nodes": size // local}


def _ranks(accelerator: str) -> Any:
    """This process among those of torchrun, joined before Lightning would."""
    from nemo_minitron.bridge.ranks import join

    return join("cpu" if accelerator == "cpu" else "auto")


def _follow(config: Config, section: Mapping[str, Any], role: Role, accelerator: str) -> bool:
    """What the ranks beside rank 0 do: train with it, write nothing."""
    ranks = _ranks(accelerator)
    state = ranks.broadcast(None)
    if state is not None:
        _train(config, section, role, state)
    ranks.broadcast(None)
    return False


def _train(config: Config, section: Mapping[str, Any], role: Role, state: Path) -> Any:
    from nemo_minitron.bridge.samples import pack
    from nemo_minitron.plugin.training import Recipe, samples_needed, train

    trainer = section["trainer"]
    tokenizer = role.tokenizer()
    text = config.data.train
    needed = text.samples or samples_needed(trainer, section["batch_size"])
    as_many_as_there_are = text.samples is None
    train_NS = pack(
        training_text(config), tokenizer, text.sequence_length, needed, text.seed, as_many_as_there_are
    )
    validation_NS = validation_samples(config, tokenizer)
    model, hf_config, files = role.start()
    recipe = Recipe(trainer, section["optim"], config.exp_manager, section["batch_size"], section["seed"])
    return train(model, hf_config, files, recipe, train_NS, validation_NS, state, role.callbacks())


def last_losses(folder: Path) -> str:
    """The end of a training in words, from its log."""
    lines = log.read_log(folder / log.FILE)
    validated = [line for line in lines if "val_loss" in line]
    steps = max(line["step"] for line in lines)
    if not validated:
        return f"{steps} steps"
    return f"{steps} steps, held-out loss {validated[-1]['val_loss']:.4f}"
