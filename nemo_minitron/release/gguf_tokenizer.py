"""transformers, gguf: the tokenizer of a model's folder as llama.cpp wants it in a GGUF file.

Source: llama.cpp's conversion/base.py (``get_vocab_base``, ``get_vocab_base_pre``,
``_create_vocab_sentencepiece``). The tokenizer of a model that came as a GGUF file goes out as it
came in, which is why its vocabulary cannot be cut. llama.cpp knows a BPE pre-tokenizer by the ids of
a text; a smaller vocabulary has other ids and the same pre-tokenizer, whose name is the source's.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml

from nemo_minitron.checkpoints.gguf_file import gguf_library
from nemo_minitron.checkpoints.gguf_weights import is_gguf, pointed
from nemo_minitron.security.plain_text import plain

_TABLE = Path(__file__).with_name("gguf_pre_tokenizers.yaml")
_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_UNKNOWN_SCORE, _ADDED_SCORE = -10000.0, -1000.0


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, their types, and what llama.cpp makes tokens of text by: merges and a name, or scores."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None


def check_tokenizer(folder: Path, source: Path, vocabulary: int, pre: str | None) -> None:
    """Refuses a tokenizer that llama.cpp does not know, or that would not be the model's.

    Args:
        folder: the model that goes out.
        source: the model that it was made of.
        vocabulary: rows of its embedding.
        pre: see ``add_tokenizer``.

    Raises:
        ValueError: it does not, and the message says which key names its pre-tokenizer; or the
            source came as a GGUF file and had another vocabulary.
    """
    if is_gguf(source):
        _check_copied(source, vocabulary)
    else:
        _vocabulary(folder, source, _tokenizer(folder), vocabulary, pre)


def add_tokenizer(
    writer: Any, folder: Path, source: Path, config: Mapping[str, Any], pre: str | None
) -> None:
    """Writes the tokenizer into a GGUF file.

    Args:
        writer: the package gguf's.
        folder: the model that goes out.
        source: the model that it was made of.
        config: the model's configuration.
        pre: llama.cpp's name of the pre-tokenizer; None: by what the source's tokenizer does.

    Raises:
        ValueError: see ``check_tokenizer``.
    """
    if is_gguf(source):
        _check_copied(source, config["vocab_size"])
        _copied(writer, source)
        return
    tokenizer = _tokenizer(folder)
    found = _vocabulary(folder, source, tokenizer, config["vocab_size"], pre)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    writer.add_token_types(found.types)
    special = gguf_library().SpecialVocab(
        folder, load_merges=found.scores is None, n_vocab=len(found.tokens)
    )
    ids = tokenizer("a")["input_ids"]
    special.add_special_token["bos"] = ids[:1] == [tokenizer.bos_token_id]
    special.add_special_token["eos"] = ids[-1:] == [tokenizer.eos_token_id]
    special.add_to_gguf(writer, quiet=True)
    if found.scores is not None:
        writer.add_add_space_prefix(_with_space(tokenizer))


def _check_copied(source: Path, vocabulary: int) -> None:
    """Refuses to copy a tokenizer of a GGUF file beside an embedding of another size.

    Raises:
        ValueError: the model that goes out has another vocabulary than the file.
    """
    tokens = pointed(source).tensors["token_embd.weight"].shape[0]
    if tokens != vocabulary:
        raise ValueError(
            f"export.gguf: the tokenizer of a model that came as GGUF goes out as it came in, with "
            f"{tokens:,} tokens here ({source}), and the plan cut the vocabulary to {vocabulary:,}; leave "
            "export.gguf out, cut no vocabulary, or begin with the model's Hugging Face folder"
        )


def _copied(writer: Any, source: Path) -> None:
    """Copies what a GGUF file says of its tokenizer, byte for byte."""
    library = gguf_library()
    reader = library.GGUFReader(pointed(source).files[0])
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)


def _tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _vocabulary(
    folder: Path, source: Path, tokenizer: Any, size: int, pre: str | None
) -> Vocabulary:
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder, tokenizer, size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    if "model" not in backend or backend["model"]["type"] != "BPE":
        raise ValueError(
            f"{folder}: export.gguf: a tokenizer that is neither BPE nor SentencePiece is not written as GGUF"
        )
    tokens, types = _tokens(tokenizer, size)
    if backend["model"]["byte_fallback"]:  # SentencePiece's BPE without its own file
        merges = backend["model"]["merges"]
        scores = dict.fromkeys(tokens, _ADDED_SCORE)
        scores |= {
            "".join(merge): -float(rank) for rank, merge in reversed(list(enumerate(merges)))
        }
        types = [6 if _is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)]
        return Vocabulary("llama", "default", tokens, types, [scores[token] for token in tokens])
    return Vocabulary("gpt2", pre or _pre(source), tokens, types, None)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pre(source: Path) -> str:
    """llama.cpp's name of a model's BPE pre-tokenizer, by the ids of a text.

    Raises:
        ValueError: it knows none by these ids.
    """
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    ids = _tokenizer(source).encode(table["text"])
    found = hashlib.sha256(str(ids).encode()).hexdigest()
    for name, sums in table["names"].items():
        if found in sums:
            return str(name)
    raise ValueError(
        f"{source}: export.gguf: llama.cpp does not know this tokenizer's pre-tokenizer by its token ids "
        f"(checksum {found[:16]}...; an earlier cut of the vocabulary changes them, too); name one of its "
        "own with export.gguf_pre, as llama-bpe, qwen2, or default"
    )


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids without a token are unused."""
    kinds = gguf_library().TokenType
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added, decoder = tokenizer.get_added_vocab(), tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(int(kinds.UNUSED))
            continue
        kind = kinds.NORMAL
        if token in added:
            if not decoder[number].normalized:
                token = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False))
            special = decoder[number].special or _looks_special(token)
            kind = kinds.CONTROL if special else kinds.USER_DEFINED
            token = token if special else token.replace("\u2581", " ")
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _looks_special(token: str) -> bool:
    """Whether an added token is one of control although the tokenizer does not say so."""
    around = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in _SPECIAL or any(
        token.startswith(begin) and token.endswith(end) for begin, end in around
    )


def _sentencepiece(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """The pieces of tokenizer.model, with their scores, and what was added to them."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            "export.gguf: tokenizer.model needs the package sentencepiece: pip install 'nemo-minitron[gguf]'"
        ) from error
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromFile(str(folder / "tokenizer.model"))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{folder / 'tokenizer.model'}: damaged: {plain(error, 200)}") from error
    kinds = gguf_library().TokenType
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores, types = [_UNKNOWN_SCORE] * size, [int(kinds.UNUSED)] * size
    for number in range(min(size, pieces.vocab_size())):
        tokens[number], scores[number] = pieces.IdToPiece(number), pieces.GetScore(number)
        tests = (
            (pieces.IsUnknown, kinds.UNKNOWN),
            (pieces.IsControl, kinds.CONTROL),
            (pieces.IsUnused, kinds.UNUSED),
            (pieces.IsByte, kinds.BYTE),
        )
        types[number] = int(next((kind for test, kind in tests if test(number)), kinds.NORMAL))
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < size:
            special = token.special or _looks_special(token.content)
            tokens[number] = token.content if special else token.content.replace("\u2581", " ")
            types[number] = int(kinds.CONTROL if special else kinds.USER_DEFINED)
            scores[number] = _ADDED_SCORE
    return Vocabulary("llama", "default", tokens, types, scores)


def _with_space(tokenizer: Any) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text, by trying."""
    return bool(tokenizer.tokenize("a")[0].startswith("\u2581"))
