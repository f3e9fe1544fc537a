"""A teacher of its own must speak of the student's tokens."""

import json
import shutil

import pytest
import transformers

from nemo_minitron.stages.vocabularies import shared_vocabulary


@pytest.fixture
def other(teacher, tmp_path):
    def make(change=lambda tokenizer: None, **config):
        folder = tmp_path / f"other{len(list(tmp_path.iterdir()))}"
        shutil.copytree(teacher, folder)
        read = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**read, **config}))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_the_same_tokens_count_whole_and_padding_does_not(teacher, other):
    entries = len(transformers.AutoTokenizer.from_pretrained(teacher))
    assert shared_vocabulary(teacher, teacher) is None
    assert shared_vocabulary(other(), teacher) is None
    assert shared_vocabulary(other(vocab_size=320), teacher) == entries


def test_tokens_that_a_teacher_alone_has_do_no_harm(teacher, other):
    entries = len(transformers.AutoTokenizer.from_pretrained(teacher))
    larger = other(lambda tokenizer: tokenizer.add_tokens(["<tool>"]), vocab_size=320)
    assert shared_vocabulary(larger, teacher) == entries
    with pytest.raises(ValueError, match=f"'<tool>' is no token there, and {entries} here"):
        shared_vocabulary(teacher, larger)  # a text may hold it


def test_swapped_ids_are_refused_by_their_token(teacher, other):
    swapped = other()
    path = swapped / "tokenizer.json"
    read = json.loads(path.read_text())
    vocabulary = read["model"]["vocab"]
    vocabulary["t"], vocabulary["h"] = vocabulary["h"], vocabulary["t"]
    path.write_text(json.dumps(read))
    with pytest.raises(
        ValueError, match=r"other meanings than the tokenizer of .*: 'h' is \d+ there, and \d+ here"
    ):
        shared_vocabulary(swapped, teacher)
