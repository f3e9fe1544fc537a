"""transformers: a model's folder made of its GGUF file: config.json, tokenizer, a pointer to the weights."""

from pathlib import Path
from typing import Any

import transformers

from nemo_minitron.checkpoints.gguf_families import config_of
from nemo_minitron.checkpoints.gguf_file import SUFFIX, Gguf, read_gguf
from nemo_minitron.checkpoints.gguf_weights import POINTER
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.manifest import write_json


def is_gguf_file(path: Path) -> bool:
    """Whether what the user names as a model is a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def gguf_config(path: Path) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    Raises:
        ValueError: it is damaged, or of an architecture that is not read here.
    """
    return both_spellings(config_of(read_gguf(path), str(path)))


def write_gguf_folder(path: Path, folder: Path) -> None:
    """Makes the folder of the model in a GGUF file; its weights stay where they are.

    Args:
        path: the file, or one of a split set.
        folder: an existing, empty folder.

    Raises:
        ValueError: it is damaged, or of an architecture that is not read here; or transformers
            makes no tokenizer of it.
    """
    gguf = read_gguf(path.resolve())
    write_json(folder / "config.json", gguf_config(path))
    _write_tokenizer(gguf, folder)
    write_json(folder / POINTER, {"file": gguf.files[0], "header": gguf.digest})


def _write_tokenizer(gguf: Gguf, folder: Path) -> None:
    if "tokenizer.ggml.tokens" not in gguf.metadata:
        return
    file = Path(gguf.files[0])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
    except Exception as error:  # whatever transformers' conversion raises
        raise ValueError(
            f"{file}: transformers {transformers.__version__} makes no tokenizer of it: "
            f"{type(error).__name__}: {plain(error, 300)}"
        ) from error
