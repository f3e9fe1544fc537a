import gzip
import json

import pytest
import torch

from nemo_minitron.bridge.models import load_tokenizer
from nemo_minitron.bridge.text import documents, find_text, pack


def found(paths, side="all", holdout=0.0, **changes):
    options = {"exclude": [], "format": "auto", "text_key": "text", "where": "data.train", **changes}
    return find_text([str(path) for path in paths], side=side, holdout=holdout, **options)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, 300)


def test_every_format_gives_the_same_documents(tmp_path):
    import datasets

    texts = [f"document {i}\nwith two lines" for i in range(5)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    import zstandard

    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    dataset = datasets.Dataset.from_dict({"body": texts})
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "e")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e"):
        assert list(documents(found([tmp_path / name], text_key="body"))) == texts, name
    (tmp_path / "f").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "f" / f"{i}.txt").write_text(text)
    assert sorted(documents(found([tmp_path / "f"]))) == texts
    assert sorted(documents(found([tmp_path / "f" / "[0-1].txt"]))) == texts[:2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: found([f / "nothing*.txt"]), "matches no file"),
        (lambda f: found([f], exclude=["*"]), "excluded by data.train.exclude"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, make, message):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_only_empty_text_and_too_little_text_are_said_so(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="hold no text"):
        pack(found([tmp_path]), tokenizer, 8, None, 0)
    (tmp_path / "short.txt").write_text("the model reads a file " * 10)
    with pytest.raises(ValueError, match="expected 1000 samples of 8 tokens, the text yields"):
        pack(found([tmp_path]), tokenizer, 8, 1000, 0)
    with pytest.raises(ValueError, match="one sample needs 5001"):
        pack(found([tmp_path]), tokenizer, 5000, None, 0)


def test_a_wrong_text_key_names_the_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(ValueError, match=r"expected text under 'text', found \['body', 'id'\]"):
        list(documents(found([tmp_path / "a.jsonl"])))


def test_samples_hold_every_token_once_and_repeat_by_seed(corpus, tokenizer):
    texts = found([corpus])
    packed = pack(texts, tokenizer, 16, None, 3)
    assert packed.shape[1] == 17
    stream = [
        i for text in documents(texts, 3) for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    expected = torch.tensor(stream[: len(packed) * 16 + 1]).unfold(0, 17, 16)
    assert sorted(packed.tolist()) == sorted(expected.tolist())
    assert torch.equal(packed, pack(texts, tokenizer, 16, None, 3))
    assert not torch.equal(packed, pack(texts, tokenizer, 16, None, 4))
    few = pack(texts, tokenizer, 16, 10, 3)
    assert few.shape == (10, 17)


def test_the_split_is_disjoint_whole_and_puts_copies_on_one_side(corpus, tmp_path):
    (tmp_path / "copy.txt").write_text((corpus / "doc00.txt").read_text())
    paths = [corpus, tmp_path]
    train = list(documents(found(paths, "train", 0.3)))
    held_out = list(documents(found(paths, "held_out", 0.3)))
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents(found(paths)))
    assert 4 <= len(held_out) <= 22


def test_one_long_document_is_split_at_its_end(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    (train,) = documents(found([tmp_path], "train", 0.1))
    (held_out,) = documents(found([tmp_path], "held_out", 0.1))
    assert train + held_out == (tmp_path / "one.txt").read_text()
    assert len(held_out) == pytest.approx(0.1 * len(train + held_out), rel=0.01)


def test_the_fingerprint_follows_the_contents_not_the_place(tmp_path, corpus):
    import shutil

    shutil.copytree(corpus, tmp_path / "moved")
    assert found([corpus]).fingerprint == found([tmp_path / "moved"]).fingerprint
    (tmp_path / "moved" / "doc00.txt").write_text("changed")
    assert found([corpus]).fingerprint != found([tmp_path / "moved"]).fingerprint
    assert found([corpus], "train", 0.1).fingerprint != found([corpus], "held_out", 0.1).fingerprint


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer_folder, tmp_path):
    with pytest.raises(ValueError, match="token ids up to 299, the model's vocabulary has 96 entries"):
        load_tokenizer(tokenizer_folder, 96)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path, 300)


def test_compressed_text_is_read_hidden_files_are_not_and_binaries_are_refused(tmp_path):
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "ab").write_text("hidden")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("packed text")
    assert list(documents(found([tmp_path]))) == ["packed text"]
    (tmp_path / "b.bin").write_bytes(b"\x00\x01")
    with pytest.raises(ValueError, match=r"b\.bin is not text"):
        list(documents(found([tmp_path])))
