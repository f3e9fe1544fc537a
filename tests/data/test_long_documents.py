"""Documents of any length: in pieces, in time linear in their length, and in bounded memory."""

import copy
import gzip
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from nemo_minitron.data import document_types, token_cache, tokenisation
from nemo_minitron.data.calibration_samples import calibration_samples
from nemo_minitron.data.document_types import LongText, in_pieces
from nemo_minitron.data.documents import documents, plain
from nemo_minitron.data.token_cache import cached_tokens
from nemo_minitron.data.tokenisation import Tokens, tokenised
from nemo_minitron.data.windows import pack, windows
from nemo_minitron.models.causal_lm import load_tokenizer
from tests.data.test_documents import write_megatron
from tests.support.text_samples import found


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, 300)


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of a hundred characters, so that every text is long."""
    for module in (document_types, tokenisation):
        monkeypatch.setattr(module, "PIECE", 100)


TEXT = "".join(f"the model reads {i}\n" + " and writes\n\n" * (i % 3) for i in range(200))


def test_pieces_end_where_lines_do_else_before_a_space_else_anywhere(short_pieces):
    for text, begins in (
        ("some words\n" * 50, "some"),
        ("some words " * 50, " "),
        ("x" * 550, "x"),
    ):
        pieces = list(in_pieces([text[:7], text[7:]]))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 100 and len(pieces) > 5
        assert all(piece.startswith(begins) for piece in pieces[1:])
    assert list(in_pieces(["a" * 100])) == ["a" * 100] and list(in_pieces([])) == []


def ids_of(texts, tokenizer, **options):
    return [i for ids, _ in tokenised(texts, tokenizer, "x", **options) for i in ids.tolist()]


@pytest.mark.parametrize("dressed", [False, True])
def test_a_text_in_pieces_has_the_tokens_of_the_whole_text(
    tmp_path, tokenizer, monkeypatch, dressed
):
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    if dressed:  # puts <s> before and </s> after a text
        special = [("<s>", own.bos_token_id), ("</s>", own.eos_token_id)]
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=special
        )
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXT[::-1]}) + "\n")
    texts = found([tmp_path])
    whole = ids_of(documents(texts), own)
    assert whole.count(own.bos_token_id) == 2 * dressed
    for module in (document_types, tokenisation):
        monkeypatch.setattr(module, "PIECE", 100)
    assert any(isinstance(document, LongText) for document in documents(texts))
    pieces = list(tokenised(documents(texts), own, "x"))
    assert len(pieces) > 20 and sum(last for _, last in pieces) == 2
    assert [i for ids, _ in pieces for i in ids.tolist()] == whole
    for skip in (1, 5):
        rest = list(tokenised(documents(texts), own, "x", skip=skip))
        assert [ids.tolist() for ids, _ in rest] == [ids.tolist() for ids, _ in pieces[skip:]]


def test_windows_do_not_depend_on_how_documents_come_in_pieces():
    draw = np.random.default_rng(0)
    lengths = [1, 30, 2, 100, 7, 7, 64, 3]
    whole = [Tokens(draw.integers(0, 99, n).astype(np.int32), True) for n in lengths]
    pieces = [
        Tokens(part, part is parts[-1])
        for ids, _ in whole
        for parts in [np.split(ids, range(5, len(ids), 5))]
        for part in parts
    ]
    for length in (1, 4, 16, 50):
        one, other = list(windows(whole, length)), list(windows(pieces, length))
        assert len(one) == (sum(lengths) - 1) // length
        for left, right in zip(one, other, strict=True):
            assert left.ids.tolist() == right.ids.tolist() and left.document == right.document
            assert left.positions.tolist() == right.positions.tolist() and left.positions[0] == 0


def test_the_sides_of_a_long_text_are_those_of_a_short_one(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n" + TEXT)

    def sides(holdout):
        found_on = [documents(found([tmp_path], side, holdout)) for side in ("train", "held_out")]
        return ["".join(plain(side)) for side in found_on]

    short = [sides(0.3), sides(0.004)]
    monkeypatch.setattr(document_types, "PIECE", 100)
    assert [sides(0.3), sides(0.004)] == short and all(map(all, short))


def test_conversations_and_ids_in_pieces_are_the_same(tmp_path, tokenizer, monkeypatch):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talk = [
        {"role": ("user", "assistant")[i % 2], "content": TEXT[i * 20 : i * 20 + 150]}
        for i in range(9)
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    write_megatron(tmp_path / "set", [list(range(5, 250)), [7, 8], list(range(9, 99))], [0, 1, 3])
    texts = found([tmp_path])
    marked = ids_of(documents(texts), own, answers_only=True)
    draws = [document_types.draw_of(document) for document in documents(texts)]
    for module in (document_types, tokenisation):
        monkeypatch.setattr(module, "PIECE", 100)
    assert ids_of(documents(texts), own, answers_only=True) == marked and min(marked) < 0
    assert [document_types.draw_of(document) for document in documents(texts)] == draws


def test_reading_stops_inside_of_a_document_when_there_is_enough(
    tmp_path, tokenizer, monkeypatch, short_pieces
):
    (tmp_path / "a.txt").write_text(TEXT * 50)
    read = []
    original = document_types._safe_end
    monkeypatch.setattr(
        document_types, "_safe_end", lambda buffer: read.append(1) or original(buffer)
    )
    monkeypatch.setattr(tokenisation, "_CHARACTERS", 200)
    monkeypatch.setattr("nemo_minitron.data.calibration_samples.POOL", 8)
    texts = found([tmp_path])
    pieces = len(TEXT) * 50 // 100
    assert len(calibration_samples([(texts, 1.0)], tokenizer, 16, 2, 0)) == 2
    assert len(pack(texts, tokenizer, 16, 2, 0).samples) == 2
    assert len(cached_tokens(tmp_path / "w", texts, tokenizer, 0, 500)) < 1000
    assert len(read) < pieces / 10


def test_a_token_cache_that_ended_inside_of_a_document_goes_on_there(
    tmp_path, tokenizer, short_pieces, monkeypatch
):
    monkeypatch.setattr(tokenisation, "_CHARACTERS", 200)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name + TEXT)
    texts = found([tmp_path])
    whole = ids_of(documents(texts), tokenizer)
    encoded = []
    original = tokenisation._encoded
    monkeypatch.setattr(
        tokenisation,
        "_encoded",
        lambda given, *a, **k: encoded.extend(given) or original(given, *a, **k),
    )
    ids = []
    for wanted in range(100, len(whole) + 700, 700):
        ids = cached_tokens(tmp_path / "w", texts, tokenizer, 0, wanted)
        assert ids.tolist() == whole[: len(ids)] and len(ids) >= min(wanted, len(whole))
    assert ids.tolist() == whole
    assert sum(map(len, encoded)) < 1.6 * len(TEXT) * 3  # no piece was made again and again
    (progress,) = (tmp_path / "w").glob(f"*/{token_cache.PROGRESS}")
    assert json.loads(progress.read_text()) == {"tokens": len(whole), "documents": 3, "ended": True}


MEASURE = """
import resource, sys, time
from pathlib import Path
from nemo_minitron.data.calibration_samples import calibration_samples
from nemo_minitron.data.documents import find_text
from nemo_minitron.models.causal_lm import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]), 300)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    texts = find_text([path], [], "auto", "text", "data.train", "train", 0.05)
    begins = time.process_time()
    calibration_samples([(texts, 1.0)], tokenizer, 64, 64, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(time.process_time() - begins, (peak - before) / 1024)
"""


def test_one_file_costs_what_many_cost_and_a_compressed_bomb_no_more_memory(
    tmp_path, tokenizer_folder
):
    text = "".join(f"the model reads a file and writes {i}\n" for i in range(30_000))
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "many").mkdir()
    for number in range(400):
        part = len(text) // 400
        (tmp_path / "many" / f"{number}.txt").write_text(text[number * part : (number + 1) * part])
    with gzip.open(tmp_path / "bomb.txt.gz", "wb", compresslevel=1) as file:
        for block in itertools.repeat(b"the model reads a file\n" * 50_000, 35):
            file.write(block)  # 40 MB of text
    paths = [str(tmp_path / name) for name in ("many", "one.txt", "bomb.txt.gz")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tokenizer_folder), *paths],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    many, one, bomb = (tuple(map(float, line.split())) for line in done.stdout.splitlines())
    assert one[0] < 3 * many[0] + 2  # seconds
    assert bomb[1] < 700  # MiB, that of the others included


def test_samples_of_one_long_text_are_those_of_before(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    samples = calibration_samples([(found([tmp_path]), 1.0)], tokenizer, 16, None, 0)
    stream = torch.tensor([*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id])
    expected = stream[: len(samples) * 16 + 1].unfold(0, 17, 16)
    assert sorted(samples.tokens_NS.tolist()) == sorted(expected.tolist())
