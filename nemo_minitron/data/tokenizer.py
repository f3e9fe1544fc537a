"""tokenizers: documents to ids; a byte-level BPE trained from text that transformers 4 and 5 both read."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemo_minitron.data.chat_template import ChatTemplate
from nemo_minitron.data.documents import Document

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
BOS, EOS = "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Trains a byte-level BPE and writes it as a fast tokenizer: no unknown token, bytes are the alphabet.

    Args:
        texts: documents.
        vocabulary: number of ids, at least 258 (256 bytes, BOS, EOS).
        folder: where tokenizer.json and its companions go.

    Raises:
        ValueError: the vocabulary is too small to hold all bytes.
    """
    if vocabulary < 258:
        raise ValueError(
            f"pretrain.model.vocab_size: a byte-level tokenizer needs at least 258, found {vocabulary}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    _speak_both_versions(folder)


def _speak_both_versions(folder: Path) -> None:
    """Writes the class name, special tokens and input names that transformers 4 looks for.

    Without the inputs it makes ``token_type_ids``, which ``generate`` refuses.
    """
    import json

    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS}
    (folder / "special_tokens_map.json").write_text(
        json.dumps(special, indent=2) + "\n", encoding="utf-8"
    )


def tokenised(
    found: Iterator[Document], tokenizer: Any, where: str, answers_only: bool = False
) -> Iterator[list[int]]:
    """Token ids of documents, each ended by the tokenizer's end token; conversations by its chat template.

    With ``answers_only`` the tokens of a conversation that no assistant said come as ~id, which is
    negative: they are read, and not learned.

    Raises:
        ValueError: a conversation without a template, or one that its template cannot render within
            its limits; ids beyond the vocabulary.
        RuntimeError: the process for the template does not start.
    """
    with contextlib.closing(ChatTemplate(tokenizer, where)) as template:
        yield from _tokenised(found, tokenizer, template, where, answers_only)


def _tokenised(
    found: Iterator[Any], tokenizer: Any, template: ChatTemplate, where: str, answers_only: bool
) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    largest = max(tokenizer.get_vocab().values())
    for kind, run in itertools.groupby(found, _kind):
        while together := list(itertools.islice(run, _TOGETHER[kind])):
            if kind == "text":
                yield from _encode(together, tokenizer, end)
            elif kind == "ids":
                yield _ended(_checked(together[0], largest, where), end)
            elif not tokenizer.chat_template:
                raise ValueError(
                    f"{where}: the text holds conversations, but the tokenizer has no chat template"
                )
            else:
                for text, answers in template.render(together, answers_only):
                    yield _ended(_conversation(text, answers, tokenizer, answers_only), end)


_TOGETHER = {"text": 256, "ids": 1, "conversation": 64}
"""How many are read at a time: texts are encoded by as many threads as there are cores, and the process that
renders conversations goes on while they are encoded."""


def _kind(document: Document) -> str:
    if isinstance(document, np.ndarray):
        return "ids"
    return "text" if isinstance(document, str) else "conversation"


def _checked(ids: Any, largest: int, where: str) -> list[int]:
    if ids.max() > largest or ids.min() < 0:
        raise ValueError(
            f"{where}: token ids up to {int(ids.max())} do not fit the tokenizer, whose largest "
            f"is {largest}: the data set was made with another one"
        )
    return list(ids.tolist())


def _conversation(
    text: str, answers: list[tuple[int, int]], tokenizer: Any, answers_only: bool
) -> list[int]:
    options = {"add_special_tokens": False, "verbose": False}
    if not answers_only:
        return list(tokenizer(text, **options)["input_ids"])
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    learned = [
        any(a <= start and end <= b for a, b in answers) for start, end in encoded["offset_mapping"]
    ]
    return [i if yes else ~i for i, yes in zip(encoded["input_ids"], learned, strict=True)]


def _encode(batch: list[str], tokenizer: Any, end: list[int]) -> Iterator[list[int]]:
    for ids in tokenizer(batch, verbose=False)["input_ids"]:
        yield _ended(ids, end)


def _ended(ids: list[int], end: list[int]) -> list[int]:
    return ids if end and ids and ids[-1] in (end[0], ~end[0]) else ids + end
