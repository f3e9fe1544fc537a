"""transformers: a model's folder made of its GGUF file: config.json, tokenizer, a pointer to the weights."""

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
import yaml

from nemo_minitron.checkpoints.gguf_families import config_of, gguf_families
from nemo_minitron.checkpoints.gguf_file import Gguf, gguf_library, read_gguf
from nemo_minitron.checkpoints.gguf_weights import POINTER
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.manifest import write_json


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
    config = gguf_config(path)
    write_json(folder / "config.json", config)
    _write_tokenizer(gguf, config["model_type"], folder)
    licence = gguf.metadata.get("general.license")
    if isinstance(licence, str):  # where a model's folder names it, too
        front = yaml.safe_dump({"license": licence})
        (folder / "README.md").write_text(f"---\n{front}---\n", encoding="utf-8")
    write_json(folder / POINTER, {"file": gguf.files[0], "header": gguf.digest})


def _write_tokenizer(gguf: Gguf, model_type: str, folder: Path) -> None:
    if "tokenizer.ggml.tokens" not in gguf.metadata:
        return
    rows = gguf_families()[model_type].rows
    try:
        # in a folder of its own, since files of a tokenizer beside it would be read in its stead
        with tempfile.TemporaryDirectory() as work:
            file = Path(work) / "tokenizer.gguf"
            if "tokenizer" in rows:
                _renamed(gguf, rows["tokenizer"], file)
            else:
                file.symlink_to(gguf.files[0])
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                work, gguf_file=file.name, trust_remote_code=False
            )
            tokenizer.save_pretrained(folder)
        _leave_out(folder, gguf.tensors["token_embd.weight"].shape[0])
    except Exception as error:  # whatever transformers' conversion raises
        raise ValueError(
            f"{gguf.files[0]}: transformers {transformers.__version__} makes no tokenizer of it: "
            f"{type(error).__name__}: {plain(error, 300)}"
        ) from error


def _leave_out(folder: Path, vocabulary: int) -> None:
    """Takes out what transformers' classes add beyond the vocabulary: tokens that they have by default."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    beyond = {token["content"] for token in content["added_tokens"] if token["id"] >= vocabulary}
    if not beyond:
        return
    kept = [token for token in content["added_tokens"] if token["content"] not in beyond]
    write_json(path, {**content, "added_tokens": kept})
    named = json.loads(settings.read_text(encoding="utf-8"))
    decoder = named.pop("added_tokens_decoder", {})
    left = {key: value for key, value in named.items() if str(value) not in beyond}
    if decoder:
        there = {number: token for number, token in decoder.items() if int(number) < vocabulary}
        left["added_tokens_decoder"] = there
    write_json(settings, left)


def _renamed(gguf: Gguf, architecture: str, path: Path) -> None:
    """A file of the same metadata under another architecture, without tensors."""
    library = gguf_library()
    writer = library.GGUFWriter(path, architecture)
    for key, field in library.GGUFReader(gguf.files[0]).fields.items():
        if key.startswith(("GGUF.", "general.", "split.")):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        name = key.replace(f"{gguf.architecture}.", f"{architecture}.", 1)
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
