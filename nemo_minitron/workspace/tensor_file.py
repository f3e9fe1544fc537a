"""Safetensors files of a workspace, read whole."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nemo_minitron.workspace.typed_json import remedy


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing; {remedy(path)}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}; {remedy(path)}") from None
