"""A tokenizer and the settings beside it, rewritten for the entries that stay, whose ids have no gaps."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_minitron.checkpoints.set_aside import GENERATION_CONFIG
from nemo_minitron.pruning.tokenizer_file import FILE, SETTINGS, TokenizerFile
from nemo_minitron.security.plain_text import plain

_ADDED, _ENTRIES, _MERGES = "added_tokens.json", "vocab.json", "merges.txt"
_STALE = ("tokenizer.model", "spiece.model", "tekken.json", "tokenizer.tiktoken", "vocab.txt")
"""The same tokenizer in another form, which would still speak of the old ids."""
_ID = re.compile(r"_token_ids?$|_token_(index|idx)$")
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
_UNKNOWN = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
"""Settings that name ids in other ways: refused rather than left as they are."""


def new_ids(kept_V: Tensor) -> dict[int, int]:
    """Old id to new id of the entries that stay."""
    return {old: new for new, old in enumerate(kept_V.tolist())}


def ids_named(folder: Path, config: Mapping[str, Any], whole: Mapping[str, Any]) -> set[int]:
    """The ids that a model's configurations name.

    Args:
        folder: where it lies.
        config: its config.json.
        whole: that of the multimodal model around it; empty: there is none.

    Raises:
        ValueError: see ``ids_in``; or one has no row in the embedding.
    """
    path = folder / GENERATION_CONFIG
    found = set(ids_in(config, str(folder / "config.json")))
    found |= set(ids_in(whole, str(folder / "config.json")))
    if path.is_file():
        found |= set(ids_in(_json(path), str(path)))
    rows = config["vocab_size"]
    beyond = sorted(each for each in found if each >= rows)
    if beyond:
        raise ValueError(
            f"plan.vocab: {folder}: a special token of config.json or {GENERATION_CONFIG} is {beyond[0]}, "
            f"and the model has {rows:,} entries; set it to one of them, or to null"
        )
    return found


def ids_in(settings: Mapping[str, Any], where: str) -> Iterator[int]:
    """The ids that a config.json or generation_config.json names, and that have to stay.

    Raises:
        ValueError: a setting names ids in a way that is not rewritten.
    """
    for key, value in settings.items():
        if key in _UNKNOWN and value:
            raise ValueError(
                f"plan.vocab: {where}: {key} names ids in a way that is not rewritten; remove it"
            )
        if _ID.search(key):
            listed = value if isinstance(value, list) else [value]
            yield from (each for each in listed if type(each) is int and each >= 0)


def renumbered(settings: Mapping[str, Any], ids: Mapping[int, int], where: str) -> dict[str, Any]:
    """A config.json or generation_config.json with the new ids.

    Raises:
        ValueError: it names an entry that is gone.
    """
    return {**settings, **ids_renumbered(settings, ids, where)}


def ids_renumbered(
    settings: Mapping[str, Any], ids: Mapping[int, int], where: str
) -> dict[str, Any]:
    """Those settings alone that name ids, with the new ones; see ``renumbered``."""
    written = {}
    for key, value in settings.items():
        if _ID.search(key):
            written[key] = _renumbered(value, ids, f"{where}: {plain(key, 80)}")
        elif key in _SUPPRESSED and isinstance(value, list):
            written[key] = [ids[each] for each in value if each in ids]
    return written


def _renumbered(value: Any, ids: Mapping[int, int], where: str) -> Any:
    if isinstance(value, list):
        return [_renumbered(each, ids, where) for each in value]
    if type(value) is not int or value < 0:  # null, or -1 for none
        return value
    if value not in ids:
        raise ValueError(f"{where}: {value} is no entry of the smaller vocabulary")
    return ids[value]


def cut_tokenizer(folder: Path, kept_V: Tensor) -> None:
    """Rewrites the files of a folder that speak of ids; those of another form of its tokenizer go.

    Args:
        folder: a model's folder, with the tokenizer of the source.
        kept_V: the entries that stay, ascending.

    Raises:
        ValueError: the tokenizer is of a kind that is not cut; a file is damaged.
    """
    ids = new_ids(kept_V)
    settings = folder / GENERATION_CONFIG
    if settings.is_file():
        _write(settings, renumbered(_json(settings), ids, str(settings)))
    tokenizer = TokenizerFile(folder)
    _write(folder / FILE, _cut(tokenizer, ids))
    if (folder / SETTINGS).is_file():
        _write(folder / SETTINGS, _of_settings(_json(folder / SETTINGS), ids))
    for name in (_ADDED, _ENTRIES):
        if (folder / name).is_file():
            _write(folder / name, _renamed(_json(folder / name), ids))
    if (folder / _MERGES).is_file():
        pairs = [" ".join(pair) for pair in _merges(tokenizer, ids)]
        (folder / _MERGES).write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    for name in _STALE:
        (folder / name).unlink(missing_ok=True)


def _cut(tokenizer: TokenizerFile, ids: Mapping[int, int]) -> dict[str, Any]:
    """The content of the smaller tokenizer.json."""
    content, model = dict(tokenizer.content), dict(tokenizer.model)
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[model["unk_id"]]
    else:
        model["vocab"] = _renamed(model["vocab"], ids)
        joined = all(isinstance(pair, str) for pair in model["merges"])
        model["merges"] = [
            " ".join(pair) if joined else list(pair) for pair in _merges(tokenizer, ids)
        ]
    content["model"] = model
    content["added_tokens"] = [
        {**token, "id": ids[token["id"]]} for token in content.get("added_tokens") or []
    ]
    if content.get("post_processor"):
        content["post_processor"] = _of_rule(content["post_processor"], ids)
    if content.get("padding"):
        padding = content["padding"]
        content["padding"] = {**padding, "pad_id": ids[padding["pad_id"]]}
    return content


def _merges(tokenizer: TokenizerFile, ids: Mapping[int, int]) -> Iterator[tuple[str, str]]:
    """The merges whose parts and result stay, in their order."""
    kept = {token for token, number in tokenizer.entries.items() if number in ids}
    for left, right in tokenizer.merges:
        if left in kept and right in kept and left + right in kept:
            yield left, right


def _renamed(vocabulary: Mapping[str, int], ids: Mapping[int, int]) -> dict[str, int]:
    kept = [(ids[number], token) for token, number in vocabulary.items() if number in ids]
    return {token: number for number, token in sorted(kept)}


def _of_rule(part: Any, ids: Mapping[int, int]) -> Any:
    """A post-processor with the new ids: in templates under ``ids``, in others beside a token's text."""
    if isinstance(part, Mapping):
        return {
            key: [ids[each] for each in value] if key == "ids" else _of_rule(value, ids)
            for key, value in part.items()
        }
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int:
            return [part[0], ids[part[1]]]
        return [_of_rule(each, ids) for each in part]
    return part


def _of_settings(settings: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer_config.json with the new ids."""
    written = renumbered(settings, ids, SETTINGS)
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        kept = {int(old): token for old, token in decoder.items() if int(old) in ids}
        written["added_tokens_decoder"] = {str(ids[old]): kept[old] for old in sorted(kept)}
    return written


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
