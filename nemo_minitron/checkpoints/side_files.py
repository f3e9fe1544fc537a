"""What belongs to a model besides config and weights: tokenizer, generation config, licence."""

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

from nemo_minitron.checkpoints.set_aside import GENERATION_CONFIG, carried
from nemo_minitron.security.links import refuse_link
from nemo_minitron.workspace.manifest import digest

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
    "tokenizer.tiktoken",
    "spiece.model",
    "vocab.txt",
)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files that say how a multimodal model's images are prepared; they belong to no causal LM."""
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps chat templates that have names (``tool_use.jinja``)."""
_LIKE_A_TOKENIZER = (
    "*token*",
    "*vocab*",
    "*.tiktoken",
    "*.spm",
    "*sentencepiece*",
    "*bpe*",
    "merges*",
    "*chat_template*",
)
"""Patterns of files that a tokenizer may need and that are not known by name."""
_CODE = {
    ".py", ".pyc", ".so", ".sh", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".joblib",
}  # fmt: skip
"""Suffixes of files that can be run, or run something when they are loaded: no terms of use."""
LICENCES = ("LICEN[CS]E*", "NOTICE*", "*POLICY*")
"""Patterns of the files that say under what terms a model may be used."""


def copy_side_files(source: Path, target: Path) -> None:
    """Copies what belongs to a model besides config and weights.

    Tokenizer, generation config, licence; byte for byte, but for what is set aside
    (``checkpoints/set_aside.py``).
    """
    for path in side_files(source):
        write_side_file(target, side_name(path, source), path.read_bytes())


def write_side_file(target: Path, name: str, content: bytes) -> None:
    """Writes a side file into a model's folder, as it is carried along."""
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_bytes(carried(name, content))


def side_name(path: Path, folder: Path) -> str:
    """A side file's name inside its model's folder."""
    return path.relative_to(folder).as_posix()


def left_behind(folder: Path) -> list[str]:
    """Names of files that look like a tokenizer's and are not carried along, as nobody here knows them."""
    known = {side_name(path, folder) for path in side_files(folder)}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and path.name not in known
        and path.suffix.lower() not in _CODE
        and any(fnmatchcase(path.name.lower(), form) for form in _LIKE_A_TOKENIZER)
    )


def side_files(folder: Path) -> list[Path]:
    """Tokenizer, generation config and licence files that a model's folder has.

    Raises:
        ValueError: one is a link that leads out of the folder.
    """
    named = [folder / name for name in (*TOKENIZER_FILES, GENERATION_CONFIG)]
    named += sorted((folder / TEMPLATES).glob("*.jinja"))
    terms = sorted({path for pattern in LICENCES for path in folder.glob(pattern)})
    found = [
        path for path in (*named, *terms) if path.is_file() and path.suffix.lower() not in _CODE
    ]
    for path in found:
        refuse_link(path, folder)
    return found


def processor_files(folder: Path) -> list[Path]:
    """Files that say how a multimodal model's images are prepared.

    Raises:
        ValueError: one is a link that leads out of the folder.
    """
    found = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    for path in found:
        refuse_link(path, folder)
    return found


def is_side_file(name: str) -> bool:
    """Whether a plain file name is that of a tokenizer's file, a generation config or a licence."""
    if name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja"):
        name = name.removeprefix(f"{TEMPLATES}/")
        return Path(name).name == name
    if not name or Path(name).name != name:
        return False
    terms = Path(name).suffix.lower() not in _CODE and any(
        fnmatchcase(name, form) for form in LICENCES
    )
    return terms or name in (*TOKENIZER_FILES, GENERATION_CONFIG)


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 over the tokenizer's files, as they are carried along."""
    held = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    held += [side_name(path, folder) for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    return digest(
        [
            [name, hashlib.sha256(carried(name, (folder / name).read_bytes())).hexdigest()]
            for name in held
        ]
    )
