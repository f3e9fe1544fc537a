"""Checkpoints of a training are read as data: a pickle that would run code is refused.

A workspace may come from somebody else, and with it what its training is resumed from. Lightning
2.4 reads checkpoints with ``weights_only=False``; so does torch.distributed.checkpoint what is no
tensor, and its ``.metadata`` is a plain pickle.
"""

import contextlib
import functools
import os
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from nemo_minitron.security.plain_text import plain

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_DATA: list[Any] = [
    DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata,  # the model's cfg
    defaultdict, OrderedDict, Any, dict, list, tuple, set, frozenset, int, float, bool, str, bytes,
    RunningStage,  # of exp_manager's timer
]  # fmt: skip
"""What a checkpoint holds besides tensors."""


@contextlib.contextmanager
def checkpoints_as_data(checkpoint: Path | None) -> Iterator[None]:
    """During the block torch loads only tensors, plain containers and OmegaConf's configurations.

    Source: torch's notes on serialization semantics (``weights_only``, its environment variables).

    Args:
        checkpoint: what is loaded, for the message.

    Raises:
        ValueError: it holds something else.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_DATA):
            yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        cause = _refused(error)
        if cause is None:
            raise
        raise ValueError(
            f"{checkpoint}: holds more than the data of a training and may run code when it is loaded, so it "
            f"is not read; remove it to start over ({cause})"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def keep_checkpoints_inside(trainer: Trainer, folder: Path) -> None:
    """Lets checkpoint callbacks take from a checkpoint only paths of the training's own folder.

    They remove what they find no longer among the best, by paths that the checkpoint holds.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.load_state_dict = functools.partial(  # type: ignore[method-assign]
                _load_inside, callback.load_state_dict, folder.resolve()
            )


def _load_inside(
    load: Callable[[dict[str, Any]], None], folder: Path, state: dict[str, Any]
) -> None:
    def inside(path: Any) -> bool:
        return isinstance(path, str) and Path(path).resolve().parent == folder

    best = state.get("best_k_models")
    kept = {
        key: value for key, value in state.items() if not key.endswith("_path") or inside(value)
    }
    kept |= {key: "" for key in state if key.endswith("_path") and key not in kept}
    kept["best_k_models"] = (
        {p: v for p, v in best.items() if inside(p)} if isinstance(best, dict) else {}
    )
    load(kept)


def _refused(error: BaseException) -> str | None:
    """What a checkpoint holds that is not data; None if loading failed for another reason."""
    if isinstance(error, CheckpointException):  # of every rank its failure
        found = [_refused(failure[0]) for failure in error.failures.values()]
        return next((each for each in found if each is not None), None)
    if not isinstance(error, pickle.UnpicklingError):
        return None
    lines = str(error).splitlines() or [""]  # torch's message has many, of advice
    return plain(next((line for line in lines if "GLOBAL" in line), lines[0]), 200)


class DataReader(FileSystemReader):
    """Reads a checkpoint in parts whose pickled ``.metadata`` only describes tensors."""

    def __init__(self, path: Path) -> None:
        """Checks the metadata before anything is read, because torch continues when reading it fails.

        Raises:
            pickle.UnpicklingError: a file holds something else.
        """
        for metadata in sorted(path.glob("*.metadata")):  # one of all ranks, or one of each
            with metadata.open("rb") as file:
                _DataUnpickler(file).load()
        super().__init__(path)


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Admits descriptions of tensors, and nothing that has an effect when called."""
        if (module, name) in _DESCRIPTIONS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if module == "torch.distributed.checkpoint.metadata" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")


_DESCRIPTIONS = {
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
    ("builtins", "set"), ("builtins", "frozenset"),
}  # fmt: skip
