"""How a tokenizer.json makes its entries: what any text needs of them, and what each is merged from.

Read are BPE over bytes (GPT-2's alphabet), BPE with or without byte fallback, and Unigram. BPE merges the
pair of the lowest rank first, inside an entry's span as anywhere: an entry that comes out of a text was made
there by the merges that make it of its own text alone.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.side_files import TOKENIZER_FILES
from nemo_minitron.pruning.vocabulary import Construction
from nemo_minitron.security.plain_text import plain

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_REFUSED = "plan.vocab: {}: {}; only tokenizers of tokenizer.json with BPE or Unigram are cut"


def alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(shifted)) for byte in range(256)]


class TokenizerFile:
    """A folder's tokenizer.json.

    Attributes:
        content: the file.
        where: its path, for messages.
    """

    def __init__(self, folder: Path) -> None:
        """Reads it.

        Raises:
            ValueError: there is none, it is damaged, or it is of a kind that is not cut.
        """
        self.where = folder / FILE
        if not self.where.is_file():
            found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
            raise ValueError(
                _REFUSED.format(
                    folder, f"expected {FILE}, found {', '.join(found) or 'no tokenizer'}"
                )
            )
        self.content = _read(self.where)
        settings = folder / SETTINGS
        code = _read(settings).get("auto_map") if settings.is_file() else None
        if isinstance(code, Mapping) and "AutoTokenizer" in code:
            raise ValueError(
                _REFUSED.format(settings, "a tokenizer with code of its own (auto_map)")
            )
        self._check()

    def _check(self) -> None:
        model = self.content.get("model")
        kind = model.get("type") if isinstance(model, Mapping) else None
        if kind not in ("BPE", "Unigram"):
            raise ValueError(_REFUSED.format(self.where, f"model.type {plain(kind, 40)!r}"))
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self.model.get(key):
                raise ValueError(
                    _REFUSED.format(self.where, f"model.{key} {plain(self.model[key], 40)!r}")
                )

    @property
    def model(self) -> dict[str, Any]:
        """The part that knows entries and merges."""
        model: dict[str, Any] = self.content["model"]
        return model

    @cached_property
    def entries(self) -> dict[str, int]:
        """The model's entries and their ids, without added tokens beside them."""
        vocab = self.model["vocab"]
        if isinstance(vocab, list):
            return {piece: number for number, (piece, _) in enumerate(vocab)}
        return dict(vocab)

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs that are merged, by rank; none of Unigram."""
        pairs = self.model.get("merges") or []
        split = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
        wrong = next((pair for pair in split if len(pair) != 2), None)
        if wrong is not None:
            raise ValueError(f"{self.where}: merges: expected two entries, found {wrong!r:.80}")
        return [(left, right) for left, right in split]

    @property
    def added(self) -> dict[str, int]:
        """Added tokens and their ids."""
        return {token["content"]: token["id"] for token in self.content.get("added_tokens") or []}

    def construction(self, rows: int) -> Construction:
        """What any text needs, and what every entry is merged from.

        Args:
            rows: entries of the model's embedding.

        Raises:
            ValueError: an id has no row there.
        """
        everything = {**self.entries, **self.added}
        beyond = next((token for token, number in everything.items() if number >= rows), None)
        if beyond is not None:
            raise ValueError(
                f"plan.vocab: {self.where}: {plain(beyond, 40)!r} is {everything[beyond]}, and the model has "
                f"{rows:,} entries; remove the token"
            )
        return Construction(
            frozenset(self._needed()), self._parts(), frozenset(everything.values())
        )

    def _needed(self) -> Iterator[int]:
        yield from self.added.values()
        names = [name for name in (*self._first_pieces(), *self._named()) if name in self.entries]
        yield from (self.entries[name] for name in names)
        if self.model["type"] == "Unigram":
            scores = [score for _, score in self.model["vocab"]]
            if scores:  # what an unknown character costs is counted from the lowest
                yield scores.index(min(scores))
            if self.model.get("unk_id") is not None:
                yield self.model["unk_id"]

    def _first_pieces(self) -> Iterator[str]:
        """What a text is made of before anything is merged, as far as it needs to stay."""
        if _has_type(self.content, "ByteLevel"):
            yield from alphabet()
            return
        if self.model.get("byte_fallback") and all(name in self.entries for name in _BYTES):
            yield from _BYTES
            yield from map(chr, range(128))
            return
        yield from (name for name in self.entries if len(name) == 1)  # nothing else can write them

    def _named(self) -> Iterator[str]:
        """Entries, and characters, of which the tokenizer's own rules speak."""
        if self.model.get("unk_token"):
            yield self.model["unk_token"]
        for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
            for text in _texts(self.content.get(part)):
                yield text
                yield from text

    def _parts(self) -> dict[int, tuple[int, int]]:
        """The last pair that each entry is merged from."""
        ways: dict[str, list[tuple[str, str]]] = {}
        for left, right in self.merges:
            ways.setdefault(left + right, []).append((left, right))
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        found = {}
        for token, pairs in ways.items():
            pair = pairs[0] if len(pairs) == 1 else _last_merge(token, ranks)
            if pair is not None and token in self.entries:
                found[self.entries[token]] = (self.entries[pair[0]], self.entries[pair[1]])
        return found


def _last_merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The pair that a text of one entry is merged from in the end; None where it never becomes that entry."""
    symbols = list(token)
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        place = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[place] not in ranks:
            return None
        if len(symbols) == 2:
            return pairs[0]
        symbols[place : place + 2] = ["".join(pairs[place])]
    return None


def _has_type(part: Any, kind: str) -> bool:
    """Whether a rule of this type is among those of a tokenizer."""
    if isinstance(part, Mapping):
        return part.get("type") == kind or any(
            _has_type(part.get(key), kind)
            for key in ("pre_tokenizer", "normalizer", "pretokenizers", "normalizers")
        )
    return isinstance(part, list) and any(_has_type(each, kind) for each in part)


def _texts(part: Any) -> Iterator[str]:
    """All texts in a rule, but for the names of its type."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        for key, value in part.items():
            if key != "type":
                yield from _texts(value)
    elif isinstance(part, list):
        for each in part:
            yield from _texts(each)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"plan.vocab: {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"plan.vocab: {path}: expected a mapping")
    return content
