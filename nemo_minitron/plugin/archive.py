"""NeMo's configuration of a model and its ``.nemo`` archive."""

import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_minitron.artifacts.side_files import side_files


def make_cfg(
    hf_config: dict[str, Any], folder: Path | None, optim: dict[str, Any] | None, **rest: Any
) -> DictConfig:
    """The NeMo ``cfg`` of a model: its config.json, the side files in ``folder``, and its optimiser.

    The card is among these: it names the licence.
    """
    card = [] if folder is None else [path for path in (folder / "README.md",) if path.is_file()]
    present = [] if folder is None else [*side_files(folder), *card]
    files = {_file_key(path.name): str(path) for path in present}
    # NeMo restores only targets inside its own packages; of this one, it takes the subclass that is asked to
    # restore
    target = "nemo.core.classes.modelPT.ModelPT"
    cfg = OmegaConf.create({"target": target, "hf_config": hf_config, "files": files, **rest})
    if optim is not None:
        with open_dict(cfg):
            cfg.optim = OmegaConf.create(optim)
    return cfg


def _file_key(name: str) -> str:
    return name.replace(".", "__dot__")  # dots separate levels in NeMo's artifact keys


def file_name(key: str) -> str:
    """The file that an entry of ``cfg.files`` stands for."""
    return key.replace("__dot__", ".")


def dtypes_of(model: Any) -> dict[str, list[str]]:
    """Dtypes to the names of the parameters that are stored in them."""
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(name)
    return found


def as_stored(model: Any, cfg: DictConfig) -> Any:
    """A model with its weights in the dtypes that its configuration says they are stored in."""
    for dtype, names in (cfg.get("dtypes") or {}).items():
        for name in names:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def nemo_archive(model: Any, path: Path) -> Path:
    """Writes a ``.nemo`` archive atomically and returns its path."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        model.save_to(str(temporary))
        temporary.replace(path)
    return path


def check_archive(path: Path) -> None:
    """Refuses a ``.nemo`` archive that is none of ``MinitronModel``'s.

    Raises:
        ValueError: it is no archive, or one of another model.
    """
    try:
        with tarfile.open(path) as archive:
            names = [name for name in archive.getnames() if Path(name).name == "model_config.yaml"]
            file = archive.extractfile(names[0]) if names else None
            text = "" if file is None else file.read().decode("utf-8")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a .nemo archive ({error})") from error
    if "hf_config" not in OmegaConf.create(text):
        raise ValueError(
            f"{path}: a .nemo archive of another model class, not one that this package wrote; convert it to "
            "a Hugging Face folder with the NeMo that made it (its scripts/checkpoint_converters)"
        )
