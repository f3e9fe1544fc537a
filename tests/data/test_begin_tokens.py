"""Samples of a tokenizer that puts tokens before every text begin with them, wherever they are cut."""

import copy
import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch

from nemo_minitron.config.compose import load_config
from nemo_minitron.data.calibration_samples import calibration_samples
from nemo_minitron.data.documents import documents
from nemo_minitron.data.tokenisation import Tokens, begin_tokens
from nemo_minitron.data.training_samples import training_samples
from nemo_minitron.data.windows import pack, windows
from nemo_minitron.evaluation.own_tokens import in_own_tokens
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.plugin.data_sets import data_set, samples_of
from tests.data.test_documents import write_megatron
from tests.support.text_samples import found

LENGTH = 16


def opening(tokenizer, *tokens):
    """The tokenizer, putting these tokens before every text."""
    made = copy.deepcopy(tokenizer)
    known = made.get_vocab()
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join([*tokens, "$A"]), special_tokens=[(token, known[token]) for token in tokens]
    )
    return made


@pytest.fixture(scope="module")
def plain(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, 300)


@pytest.fixture(scope="module")
def gemma(plain):
    """Begins every text as Gemma's and Llama's do."""
    return opening(plain, "<s>")


def stream_of(texts, tokenizer, seed):
    return [
        i
        for text in documents(texts, seed)
        for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]


def begun_rows(stream, begin, count):
    """Windows of a stream, each begun: what every reader must come to."""
    rows = torch.tensor(stream[: count * LENGTH + 1]).unfold(0, LENGTH + 1, LENGTH).clone()
    rows[:, : len(begin)] = torch.tensor(begin)
    return sorted(rows.tolist())


def test_every_reader_begins_its_samples(corpus, teacher, tmp_path, plain, gemma):
    texts, begin = found([corpus]), [gemma.convert_tokens_to_ids("<s>")]
    assert begin_tokens(gemma).tolist() == begin and not len(begin_tokens(plain))
    scored = calibration_samples([(texts, 1.0)], gemma, LENGTH, None, 3)
    packed = pack(texts, gemma, LENGTH, None, 3)
    expected = begun_rows(stream_of(texts, gemma, 3), begin, len(scored))
    assert sorted(scored.tokens_NS.tolist()) == expected == sorted(packed.samples.tolist())
    inside = calibration_samples([(texts, 1.0)], gemma, LENGTH, None, 3, "documents")
    assert torch.equal(inside.tokens_NS, scored.tokens_NS)
    shutil.copytree(teacher, tmp_path / "gemma")
    gemma.save_pretrained(tmp_path / "gemma")
    of_nemo = {"paths": [str(corpus)], "tokenizer": str(tmp_path / "gemma"), "seed": 3}
    values = data_set({**of_nemo, "sequence_length": LENGTH}, "model.validation_ds")
    assert sorted(samples_of(values, "model.validation_ds").tolist()) == expected


def test_a_training_reads_the_tokens_that_it_did_after_the_first(corpus, tmp_path, plain, gemma):
    config = load_config("config", [
        f"workspace={tmp_path / 'w'}", f"data.train.paths=[{corpus}]", f"data.train.sequence_length={LENGTH}",
        "data.train.seed=3", f"data.validation.paths=[{corpus}]",
    ])  # fmt: skip
    rows = {}
    for name, tokenizer in (("plain", plain), ("gemma", gemma)):
        samples = training_samples(config, tokenizer, 10**6, 4, Ranks())
        rows[name] = [samples[i].tolist() for i in range(len(samples))]
    stream = stream_of(found([corpus]), gemma, 3)
    begin = [gemma.convert_tokens_to_ids("<s>")]
    assert sorted(rows["gemma"]) == begun_rows(stream, begin, len(rows["gemma"]))
    # every token but the first of the text is predicted once, what begins a sample is only read
    assert sorted(i for row in rows["gemma"] for i in row[1:]) == sorted(
        stream[1 : len(rows["gemma"]) * LENGTH + 1]
    )
    stream = stream_of(found([corpus]), plain, 3)
    assert sorted(rows["plain"]) == begun_rows(stream, [], len(rows["plain"]))


def test_an_answer_that_is_read_and_not_learned_may_begin_a_sample(corpus, tmp_path, gemma):
    speaking = copy.deepcopy(gemma)
    speaking.chat_template = "{{ '<s>' }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    talk = [
        {"role": "user", "content": "the model " * 20},
        {"role": "assistant", "content": "reads a file"},
    ]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 30)
    config = load_config("config", [
        f"workspace={tmp_path / 'w'}", f"data.train.paths=[{tmp_path / 'chat.jsonl'}]",
        f"data.train.sequence_length={LENGTH}", "data.train.learn_from=answers", f"data.validation.paths=[{corpus}]",
    ])  # fmt: skip
    samples = training_samples(config, speaking, 100, 4, Ranks())
    (begin,) = begin_tokens(gemma).tolist()
    assert {samples[i][0].item() for i in range(len(samples))} == {begin}
    assert any((samples[i][1:] < 0).all() for i in range(len(samples)))


def test_tokenizers_that_begin_with_two_tokens_and_windows_too_short_for_them(plain):
    glm = opening(plain, "<s>", "</s>")
    begin = begin_tokens(glm)
    assert begin.tolist() == glm.convert_tokens_to_ids(["<s>", "</s>"])
    stream = [Tokens(np.arange(100, 141, dtype=np.int32), True)]
    rows = [window.ids.tolist() for window in windows(stream, 8, begin)]
    assert rows == [[*begin.tolist(), *range(i + 2, i + 9)] for i in range(100, 140, 8)]
    assert [window.ids.tolist() for window in windows(stream, 1, begin)][:2] == [
        [begin[0], 101],
        [begin[0], 102],
    ]


def test_a_document_of_token_ids_is_begun_where_it_has_a_sample_of_its_own(tmp_path, gemma):
    (tmp_path / "a.txt").write_text("the model")
    (begin,) = begin_tokens(gemma).tolist()
    ids = gemma("the model")["input_ids"]
    alone = calibration_samples([(found([tmp_path]), 1.0)], gemma, 20, None, 0, "off")
    assert alone.tokens_NS[alone.valid_NS].tolist() == [*ids, gemma.eos_token_id]
    write_megatron(tmp_path / "set", [ids[1:], ids], [0, 1, 2])
    read = calibration_samples([(found([tmp_path / "set.bin"]), 1.0)], gemma, 20, None, 0, "off")
    assert ids[0] == begin
    assert read.tokens_NS[read.valid_NS].tolist() == [*ids, gemma.eos_token_id] * 2
    short = calibration_samples([(found([tmp_path / "set.bin"]), 1.0)], gemma, 1, None, 0, "off")
    assert short.tokens_NS.tolist() == [ids[:2]] * 2


def test_text_in_a_models_own_tokens_begins_as_its_own_tokenizer_does(corpus, plain, gemma):
    samples_NS = pack(found([corpus]), gemma, LENGTH, 8, 0).samples
    (begin,) = begin_tokens(gemma).tolist()
    kept = in_own_tokens(gemma, gemma, samples_NS, None)
    assert kept[:, 0].tolist() == [begin] * 8
    assert [gemma.decode(row[row >= 0]) for row in kept] == [
        gemma.decode(row) for row in samples_NS
    ]
    bare = in_own_tokens(gemma, plain, samples_NS, None)
    assert [plain.decode(row[row >= 0]) for row in bare] == [
        gemma.decode(row[1:]) for row in samples_NS
    ]
