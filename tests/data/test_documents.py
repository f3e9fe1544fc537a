import gzip
import json
import shutil
import struct

import numpy as np
import pytest
import torch

from nemo_minitron.config.compose import load_config
from nemo_minitron.data.calibration_samples import calibration_samples
from nemo_minitron.data.documents import documents, plain
from nemo_minitron.data.mixtures import text_input, training_text
from nemo_minitron.data.windows import pack, pack_mixture
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.workspace.layout import Workspace, commit_in
from nemo_minitron.workspace.manifest import digest, write_json
from tests.support.text_samples import found


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


def test_of_a_saved_set_with_splits_train_is_read_and_nothing_else(tmp_path):
    import datasets

    def saved(name, **splits):
        made = {
            split: datasets.Dataset.from_dict({"text": texts}) for split, texts in splits.items()
        }
        datasets.DatasetDict(made).save_to_disk(tmp_path / name)
        return tmp_path / name

    wiki = saved("wiki", train=["one", "two"], test=["seen in no training"])
    texts = found([wiki])
    assert list(documents(texts)) == ["one", "two"]
    assert list(documents(found([wiki / "test"]))) == ["seen in no training"]
    assert texts.fingerprint == found([wiki / "train"]).fingerprint
    other = saved("other", train=["one", "two"], test=["another test", "of two"])
    assert list(documents(found([other]))) == list(documents(texts))
    alone = saved("alone", train=["one", "two"])
    assert found([alone]).files == (alone,)  # read whole before as well: its fingerprint stays
    assert list(documents(found([alone]))) == ["one", "two"]
    parts = saved("parts", validation=["a"], test=["b"])
    both = f"{parts / 'test'}, {parts / 'validation'}"
    with pytest.raises(
        ValueError, match=r"data\.train\.paths: .*parts: expected a split 'train'"
    ) as no:
        found([parts])
    assert str(no.value).endswith(f"name the folder of the one to read: {both}")
    shutil.rmtree(wiki / "train")
    with pytest.raises(ValueError, match=r"expected a split 'train'.*one to read: \S+/wiki/test$"):
        found([wiki])
    (parts / "dataset_dict.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"dataset_dict\.json: not the list of .* splits: KeyError"
    ):
        found([parts])


def test_a_name_with_brackets_or_stars_is_no_pattern(tmp_path):
    import datasets

    for name in ("a1", "a[1]", "a*", "b?"):
        rows = datasets.Dataset.from_dict({"text": [f"of {name}"]})
        rows.to_parquet(tmp_path / f"{name}.parquet")
        rows.save_to_disk(tmp_path / "sets" / name)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"of {name}"}))
    for name in ("a1", "a[1]", "a*", "b?"):
        for place in (f"{name}.parquet", f"sets/{name}", f"{name}.jsonl"):
            assert list(documents(found([tmp_path / place]))) == [f"of {name}"], place


def test_a_noted_commit_of_a_data_set_names_the_text_without_the_hub(tmp_path):
    notes, commit = Workspace(tmp_path).data_commits, "c" * 40
    for name in ("org/lines", "org/b"):
        noted = {"data_set": name, "asked": None, "commit": commit}
        path = commit_in(notes, name, None)
        path.parent.mkdir(exist_ok=True)
        write_json(path, noted)

    def text(*paths):
        words = [f"workspace={tmp_path}", f"data.train.paths={list(paths)}", "data.holdout=0.1"]
        return text_input(training_text(load_config("config", words)))

    one = text("hf://org/lines/en:test[:9]")
    assert one.path == f"data.train (0 files, train; hf://org/lines/en:test[:9] at {commit})"
    # as it was before commits were noted
    expected = [[["hf://org/lines/en:test[:9]", commit]], "auto", "text", "train", 0.1]
    assert one.fingerprint == digest(expected)
    assert text(f"hf://org/lines@{commit}/en:test[:9]") == one
    other = text(f"hf://org/lines@{'d' * 40}/en:test[:9]")
    assert other.fingerprint != one.fingerprint and "d" * 40 in other.path
    # the order of data sets, and so that of documents, is that of the names without commits
    pair = text("hf://org/lines", "hf://org/b")
    assert pair == text(f"hf://org/lines@{commit}", f"hf://org/b@{commit}")
    assert pair.path.endswith(f"train; hf://org/b at {commit}; hf://org/lines at {commit})")


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


def test_a_rule_of_what_to_leave_out_that_matches_nothing_is_named(tmp_path, capsys):
    for name in ("a.txt", "b.py"):
        (tmp_path / name).write_text("x")
    assert (
        len(found([tmp_path], exclude=["*.py", "*/cache/*"]).files) == 1
    )  # one that matches is enough
    assert not capsys.readouterr().err
    assert len(found([tmp_path], exclude=[f"{tmp_path}/*.toml"]).files) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"data.train.exclude: {tmp_path}/*.toml matches none of 2 files"


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
    with pytest.raises(
        ValueError, match=r"messages with role and content, under 'text', found \['body', 'id'\]"
    ):
        list(documents(found([tmp_path / "a.jsonl"])))


def test_samples_hold_every_token_once_and_repeat_by_seed(corpus, tokenizer):
    texts = found([corpus])
    packed = pack(texts, tokenizer, 16, None, 3).samples
    assert packed.shape[1] == 17
    stream = [
        i
        for text in documents(texts, 3)
        for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    expected = torch.tensor(stream[: len(packed) * 16 + 1]).unfold(0, 17, 16)
    assert sorted(packed.tolist()) == sorted(expected.tolist())
    assert torch.equal(packed, pack(texts, tokenizer, 16, None, 3).samples)
    assert not torch.equal(packed, pack(texts, tokenizer, 16, None, 4).samples)
    few = pack(texts, tokenizer, 16, 10, 3)
    assert few.samples.shape == (10, 17) and len(few.documents) == 10
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in documents(texts, 3)]
    whose = [number for number, length in enumerate(lengths) for _ in range(length)]
    middles = [whose[k * 16 + 8] for k in range(len(packed))]
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(3)).tolist()
    assert pack(texts, tokenizer, 16, None, 3).documents == [middles[k] for k in order]
    assert len(set(middles)) > 3


def test_what_is_measured_on_is_mixed_by_the_weights(tmp_path, tokenizer):
    for name, word in (("a", "alpha"), ("b", "beta"), ("short", "x")):
        (tmp_path / name).mkdir()
        for number in range(1 if name == "short" else 30):
            (tmp_path / name / f"{number}.txt").write_text(
                f"{word} " * (1 if name == "short" else 40)
            )
    mixture = [
        (found([tmp_path / name]), weight)
        for name, weight in (("a", 3.0), ("b", 1.0), ("short", 0.1))
    ]
    both = pack_mixture(mixture, tokenizer, 16, 40, 0, False, "data.validation")
    packed = both.samples
    beta = set(tokenizer(" beta beta")["input_ids"]) - set(tokenizer(" alpha alpha")["input_ids"])
    of_b = sum(bool(beta & set(row.tolist())) for row in packed)
    assert packed.shape == (40, 17) and of_b == 10
    mine = {
        number
        for number, row in zip(both.documents, packed, strict=True)
        if beta & set(row.tolist())
    }
    assert mine.isdisjoint(
        number
        for number, row in zip(both.documents, packed, strict=True)
        if not beta & set(row.tolist())
    )
    with pytest.raises(
        ValueError, match=r"data\.validation\.samples: expected 100000 samples of 16 tokens"
    ):
        pack_mixture(mixture, tokenizer, 16, 100000, 0, False, "data.validation")
    assert (
        len(pack_mixture(mixture, tokenizer, 16, 100000, 0, True, "data.validation").samples) > 40
    )


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
    with pytest.raises(
        ValueError, match="token ids up to 299, the model's vocabulary has 96 entries"
    ):
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


def calibrate(texts, tokenizer, samples=None, packing="plain", length=16):
    mixture = texts if isinstance(texts, list) else [(texts, 1.0)]
    return calibration_samples(mixture, tokenizer, length, samples, 3, packing)


def test_the_first_samples_are_the_same_however_many_are_asked_for(corpus, tokenizer):
    texts = found([corpus])
    every = calibrate(texts, tokenizer)
    few = calibrate(texts, tokenizer, 10)
    assert few.fingerprints() == every.fingerprints()[:10]
    assert len(set(every.fingerprints())) > 0.99 * len(every)
    stream = [
        i
        for text in documents(texts, 3)
        for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    expected = torch.tensor(stream[: len(every) * 16 + 1]).unfold(0, 17, 16)
    assert sorted(every.tokens_NS.tolist()) == sorted(expected.tolist())
    # not a few long documents: half of the windows come from the second half of the text
    places = {tuple(row): i for i, row in enumerate(expected.tolist())}
    where = [places[tuple(row)] for row in every.tokens_NS[:200].tolist()]
    assert 60 < sum(place >= len(every) / 2 for place in where) < 140
    with pytest.raises(ValueError, match="expected 99999 samples of 16 tokens, the text yields"):
        calibrate(texts, tokenizer, 99999)


def test_documents_that_share_a_sample_keep_their_own_positions(tmp_path, tokenizer):
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text("the model reads a file " * (i % 3 + 1))
    texts = found([tmp_path])
    packed = calibrate(texts, tokenizer, packing="documents", length=40)
    assert torch.equal(packed.tokens_NS, calibrate(texts, tokenizer, length=40).tokens_NS)
    ends = packed.tokens_NS[:, :-1] == tokenizer.eos_token_id
    starts = packed.positions_NS[:, 1:] == 0
    assert torch.equal(ends, starts) and starts.any()
    assert ((packed.positions_NS[:, 1:] - packed.positions_NS[:, :-1] == 1) | starts).all()
    batch = packed.batch([0, 1])
    assert torch.equal(batch.labels_BS == -1, starts[:2])
    assert set(batch.inputs()) == {"input_ids", "use_cache", "position_ids"}


def test_one_document_per_sample_is_padded(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the model")
    (tmp_path / "b.txt").write_text("the model reads a file and writes the answer " * 9)
    samples = calibrate(found([tmp_path]), tokenizer, packing="off", length=20)
    lengths = samples.valid_NS.sum(1).tolist()
    assert sorted(lengths) == [len(tokenizer("the model")["input_ids"]) + 1, 21]
    batch = samples.batch([0, 1])
    assert torch.equal(batch.labels_BS >= 0, samples.valid_NS[:, 1:])
    assert torch.equal(batch.inputs()["attention_mask"].bool(), samples.valid_NS[:, :-1])


def test_a_mixture_has_the_shares_that_were_asked_for_at_every_length(tmp_path, tokenizer):
    words = ("model ", "file ", "answer ")
    for name, word in zip("abc", words, strict=True):
        (tmp_path / f"{name}.txt").write_text(word * 2000)
    sets = [
        (found([tmp_path / f"{name}.txt"]), weight)
        for name, weight in (("a", 5), ("b", 3), ("c", 2))
    ]
    samples = calibrate(sets, tokenizer, 30)
    texts = [tokenizer.decode(row) for row in samples.tokens_NS]
    heads = [next(i for i, word in enumerate(words) if word.strip() in text) for text in texts]
    for count in (10, 20, 30):
        assert [heads[:count].count(i) for i in range(3)] == [
            count * 5 // 10,
            count * 3 // 10,
            count * 2 // 10,
        ]
    assert calibrate(sets, tokenizer, 10).fingerprints() == samples.fingerprints()[:10]


def test_conversations_go_through_the_tokenizers_template(tmp_path, tokenizer):
    import copy

    talk = [
        {"role": "user", "content": "the model"},
        {"role": "assistant", "content": "reads a file"},
    ]
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": talk}) + "\n" for _ in range(50))
    )
    texts = found([tmp_path / "chat.jsonl"])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        calibrate(texts, tokenizer, 2)
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    )
    samples = calibrate(texts, speaking, 2, length=60)
    text = speaking.decode(samples.tokens_NS[0], skip_special_tokens=False)
    assert "<user>the model</user><assistant>reads a file</assistant></s>" in text
    assert next(plain(documents(texts))) == "the model\nreads a file"


def write_megatron(prefix, sequences, boundaries, code=8):
    """The two files of an indexed data set, as Megatron-LM lays them out."""
    dtype = {4: "<i4", 8: "<u2"}[code]
    arrays = [np.array(ids, dtype) for ids in sequences]
    prefix.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    offsets = np.cumsum([0, *[array.nbytes for array in arrays]])[:-1]
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(arrays), len(boundaries))
        + np.array([len(array) for array in arrays], "<i4").tobytes()
        + np.array(offsets, "<i8").tobytes()
        + np.array(boundaries, "<i8").tobytes()
    )


@pytest.mark.parametrize("code", [4, 8])
def test_megatron_data_sets_are_read_as_they_are(tmp_path, tokenizer, code):
    write_megatron(tmp_path / "set", [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [0, 2, 3], code)
    for path in ("set", "set.bin", "set.idx", ""):
        texts = found([tmp_path / path])
        assert [document.tolist() for document in documents(texts)] == [
            [5, 6, 7, 8, 9],
            [10, 11, 12, 13],
        ]
    end = tokenizer.eos_token_id
    samples = calibrate(texts, tokenizer, length=10)
    assert samples.tokens_NS.tolist() == [[5, 6, 7, 8, 9, end, 10, 11, 12, 13, end]]
    write_megatron(tmp_path / "set", [[5, 6, 299], [400]], [0, 1, 2], code)
    with pytest.raises(ValueError, match="token ids up to 400 do not fit the tokenizer"):
        calibrate(found([tmp_path]), tokenizer, length=2)
    raw = (tmp_path / "set.bin").read_bytes()
    (tmp_path / "set.bin").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match=r"set\.idx: not a usable index"):
        list(documents(found([tmp_path])))
