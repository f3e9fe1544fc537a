"""What belongs to a model besides config and weights: tokenizer, generation config, licence."""

from pathlib import Path

from nemo_minitron.artifacts.manifest import digest, hash_file

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
)
LICENCES = ("LICEN[CS]E*", "NOTICE*", "*POLICY*")
"""Patterns of the files that say under what terms a model may be used."""


def copy_side_files(source: Path, target: Path) -> None:
    """Copies what belongs to a model besides config and weights.

    Tokenizer, generation config, licence; byte for byte.
    """
    for path in side_files(source):
        (target / path.name).write_bytes(path.read_bytes())


def side_files(folder: Path) -> list[Path]:
    """Tokenizer, generation config and licence of a model's folder, as far as they are there."""
    named = [folder / name for name in (*TOKENIZER_FILES, "generation_config.json")]
    terms = sorted({path for pattern in LICENCES for path in folder.glob(pattern)})
    return [path for path in (*named, *terms) if path.is_file()]


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 over the tokenizer's files."""
    return digest([[name, hash_file(folder / name)] for name in TOKENIZER_FILES if (folder / name).is_file()])
