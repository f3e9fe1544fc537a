"""tokenizers: a byte-level BPE trained from text that transformers 4 and 5 both read."""

from collections.abc import Iterable
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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
