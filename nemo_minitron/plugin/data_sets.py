"""Data sets of a NeMo model (``train_ds`` and the like): their keys, and their samples."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo.utils.model_utils import parse_dataset_as_name
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_minitron.data.documents import find_text
from nemo_minitron.data.windows import pack
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.training.sampler import as_samples, validation_loader

_OF_NEMO = ("defer_setup", "name")
"""Keys of a data set beside those of ``DataSet``: NeMo reads the first, ``loaders_of`` the second."""
_ELSEWHERE = {
    "micro_batch_size": "batch_size",
    "global_batch_size": "batch_size, and trainer.accumulate_grad_batches",
    "max_seq_length": "sequence_length",
    "seq_length": "sequence_length",
    "file_path": "paths",
    "manifest_filepath": "paths",
    "data_path": "paths",
}


@dataclass(frozen=True)
class DataSet:
    """A data set of a model's ``cfg``.

    Attributes:
        paths: files, folders, glob patterns; of ``validation_ds`` and ``test_ds`` a list is one set,
            with a loader and a name, for each entry.
        tokenizer: folder of a tokenizer.
        exclude: glob patterns of files to leave out.
        format: ``auto``, ``text``, ``jsonl``, ``parquet``, ``hf`` or ``megatron``.
        text_key: column that holds the text, or a conversation.
        sequence_length: tokens per sample.
        samples: how many to take; None: all of them.
        seed: of the order of files and samples.
        batch_size: samples per batch and device.
        shuffle: whether a training reads them in an order redrawn for each epoch.
        num_workers: processes that prepare batches; 0: none.
        pin_memory: whether batches are made in memory that GPUs read directly.
    """

    paths: str | list[str]
    tokenizer: str
    exclude: list[str] = field(default_factory=list)
    format: str = "auto"
    text_key: str = "text"
    sequence_length: int = 1024
    samples: int | None = None
    seed: int = 0
    batch_size: int = 1
    shuffle: bool = True
    num_workers: int = 0
    pin_memory: bool = False


def data_set(cfg: DictConfig | dict[str, Any], where: str) -> DataSet:
    """Checks a data set's configuration.

    Args:
        cfg: its configuration.
        where: its name, for messages.

    Raises:
        ValueError: a key is unknown (the nearest is named) or missing, or a value of another type.
    """
    given = OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)
    assert isinstance(given, dict)
    known = {item.name: item for item in dataclasses.fields(DataSet)}
    for key in given:
        if key not in known and key not in _OF_NEMO:
            near = _ELSEWHERE.get(key) or ", ".join(difflib.get_close_matches(str(key), known, 3))
            hint = f"; here: {near}" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"{where}.{key}: unknown{hint}")
    for key in ("paths", "tokenizer"):
        if not given.get(key):
            raise ValueError(f"{where}.{key}: missing")
    values = {key: value for key, value in given.items() if key in known}
    found = DataSet(**values)
    for name in ("sequence_length", "batch_size", "samples", "num_workers", "seed"):
        value, least = getattr(found, name), 0 if name in ("num_workers", "seed") else 1
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not (name == "samples" and value is None):
            raise ValueError(
                f"{where}.{name}: expected a whole number of at least {least}, found {value!r}"
            )
    for name in ("shuffle", "pin_memory"):
        if not isinstance(getattr(found, name), bool):
            raise ValueError(
                f"{where}.{name}: expected true or false, found {getattr(found, name)!r}"
            )
    return found


def samples_of(found: DataSet, where: str) -> Tensor:
    """The packed samples of a data set, Tensor of shape [samples, positions + 1].

    Raises:
        ValueError: no text, or too little.
    """
    paths = [found.paths] if isinstance(found.paths, str) else list(found.paths)
    texts = find_text(paths, found.exclude, found.format, found.text_key, where)
    own = load_tokenizer(Path(found.tokenizer))
    return pack(texts, own, found.sequence_length, found.samples, found.seed).samples


def loaders_of(cfg: DictConfig | dict[str, Any], where: str) -> tuple[Any, list[str] | None]:
    """The loaders of a ``validation_ds`` or ``test_ds``, and their names.

    Returns:
        One loader and None; where ``paths`` lists several entries, a loader and a name for each. The
        names are those that ``name`` lists, else NeMo's of the paths; they end in ``_``.

    Raises:
        ValueError: see ``data_set`` and ``samples_of``; or names are too few, too many, or not unique.
    """
    found = data_set(cfg, where)
    how = {"num_workers": found.num_workers, "pin_memory": found.pin_memory}
    sets = found.paths if isinstance(found.paths, list) else [found.paths]
    each = [dataclasses.replace(found, paths=path) for path in sets]
    loaders = [
        validation_loader(as_samples(samples_of(one, where)), found.batch_size, **how)
        for one in each
    ]
    if len(loaders) == 1:
        return loaders[0], None
    given = cfg.get("name")
    names = [parse_dataset_as_name(name) for name in (sets if given is None else given)]
    if len(names) != len(sets) or len(set(names)) != len(names):
        raise ValueError(
            f"{where}.name: expected {len(sets)} names, one for each entry of paths and each another, "
            f"found {[name.removesuffix('_') for name in names]}"
        )
    return loaders, names
