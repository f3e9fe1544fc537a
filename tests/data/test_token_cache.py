"""The cache of token ids: made once, grown, gone on with after a kill; which windows a training reads."""

import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from nemo_minitron.data import token_cache as module
from nemo_minitron.data.documents import documents
from nemo_minitron.data.token_cache import PackedTokens, cached_tokens, places
from nemo_minitron.data.tokenisation import tokenised
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.workspace.artifacts import verify
from tests.support.text_samples import found


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, 300)


@pytest.fixture
def texts(tmp_path):
    draw = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        words = (
            draw.choice(("alpha", "beta", "gamma", "delta")) for _ in range(draw.randint(5, 60))
        )
        (folder / f"{number:02}.txt").write_text(" ".join(words))
    return found([folder])


def made(root):
    return [path for path in root.iterdir() if path.is_dir()]


def whole(texts, tokenizer, seed=0):
    return [i for ids, _ in tokenised(documents(texts, seed), tokenizer, "x") for i in ids.tolist()]


def test_the_cache_holds_the_documents_end_to_end_and_is_made_once(
    tmp_path, texts, tokenizer, monkeypatch
):
    counted = []
    ids = cached_tokens(tmp_path / "tokens", texts, tokenizer, 0, 10**6, advance=counted.append)
    assert isinstance(ids, np.memmap)
    assert ids.tolist() == whole(texts, tokenizer) and sum(counted) == len(ids)
    (folder,) = made(tmp_path / "tokens")
    assert not verify(folder)
    monkeypatch.setattr(module, "tokenised", None)  # would be called to make it again
    again = cached_tokens(tmp_path / "tokens", texts, tokenizer, 0, 10**6)
    assert again.tolist() == ids.tolist()


def test_a_file_that_somebody_has_shortened_is_made_anew(tmp_path, texts, tokenizer):
    root = tmp_path / "tokens"
    whole_ids = cached_tokens(root, texts, tokenizer, 0, 200).tolist()
    (folder,) = made(root)
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(100)
    assert cached_tokens(root, texts, tokenizer, 0, 400).tolist()[: len(whole_ids)] == whole_ids
    assert not verify(folder)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[" * 5000, '{"tokens": 5, "documents": 1, "ended": true}',
             '{"tokens": "x", "documents": 1, "ended": true}', b"\xff\xfe"],
)  # fmt: skip
def test_a_state_that_somebody_has_changed_is_not_believed(
    tmp_path, texts, tokenizer, capsys, text
):
    root = tmp_path / "tokens"
    whole_ids = cached_tokens(root, texts, tokenizer, 0, 200).tolist()
    (folder,) = made(root)
    path = folder / "progress.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cached_tokens(root, texts, tokenizer, 0, 200).tolist() == whole_ids
    assert f"note: {path}: not the file that was made" in capsys.readouterr().err
    assert not verify(folder)


def test_wanting_more_grows_it_and_other_text_seeds_and_tokenizers_have_their_own(
    tmp_path, texts, tokenizer
):
    root = tmp_path / "tokens"
    few = cached_tokens(root, texts, tokenizer, 0, 200)
    assert 200 <= len(few) < 400
    before = few.tolist()
    asked = []
    more = cached_tokens(root, texts, tokenizer, 0, 10**6, advance=asked.append)
    assert asked[0] == len(before) and max(asked[1:]) < 300  # what was there was not made again
    assert more.tolist() == whole(texts, tokenizer)
    (folder,) = made(root)
    assert not verify(folder)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    assert cached_tokens(root, texts, tokenizer, 1, 10**6).tolist() == whole(texts, tokenizer, 1)
    cached_tokens(root, texts, other, 0, 100)
    cached_tokens(root, texts, tokenizer, 0, 100, answers_only=True)
    assert len(made(root)) == 4


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from nemo_minitron.data import token_cache as module
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.data.documents import find_text

root, draw, kills = Path(sys.argv[1]), random.Random(1), 0
module._SAVE_SECONDS = 0.0
while True:
    child = os.fork()
    if child == 0:
        texts = find_text([sys.argv[2]], [], "auto", "text", "data.train")
        slow = lambda _: time.sleep(0.005)
        module.cached_tokens(root, texts, load_tokenizer(Path(sys.argv[3]), 300), 0, 10**6, advance=slow)
        os._exit(0)
    if kills < 6:
        time.sleep(draw.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    kills += 1
    assert not list(root.glob("*/manifest.json"))
print(kills, status)
"""


def test_killed_again_and_again_it_comes_out_the_same(tmp_path, texts, tokenizer, tokenizer_folder):
    root = tmp_path / "tokens"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(root), str(tmp_path / "text"), str(tokenizer_folder)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "6 0\n", done.stderr[-2000:]
    assert cached_tokens(root, texts, tokenizer, 0, 10**6).tolist() == whole(texts, tokenizer)


def test_no_text_is_said_so(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"data\.train\.paths: 1 files hold no text"):
        cached_tokens(tmp_path / "tokens", found([tmp_path / "a.txt"]), tokenizer, 0, 100)


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversations(tmp_path):
    rows = [
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": "a model"},
            {"role": "user", "content": "whose"},
            {"role": "assistant", "content": "ours"},
        ]
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return found([path])


def test_only_answers_are_learned_where_that_is_asked_for(tmp_path, tokenizer):
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = CHAT
    texts = conversations(tmp_path)
    ((plain, _),) = tokenised(documents(texts), speaking, "x")
    ((marked, _),) = tokenised(documents(texts), speaking, "x", answers_only=True)
    assert [~i if i < 0 else i for i in marked.tolist()] == plain.tolist()
    learned, run = [], []
    for i in [*marked, -1]:
        if i >= 0:
            run.append(i)
        elif run:
            learned.append(speaking.decode(run, skip_special_tokens=False))
            run = []
    assert learned == ["a model<|end|>", "ours<|end|></s>"]


def test_a_template_that_rewrites_the_past_is_refused(tmp_path, tokenizer):
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(ValueError, match=r"rewrites what was said before.*learn_from=all"):
        list(tokenised(documents(conversations(tmp_path)), speaking, "x", answers_only=True))


def test_windows_of_one_stream_come_once_and_overlap_by_one_token():
    stream = np.arange(41, dtype=np.int32)
    samples = PackedTokens([stream], places([41], [1.0], 8, 100, 0), 8)
    assert len(samples) == 5
    rows = sorted(samples[i].tolist() for i in range(5))
    assert rows == [list(range(i, i + 9)) for i in range(0, 40, 8)]
    assert samples[0].dtype == torch.int64


def test_a_mixture_has_the_shares_that_were_asked_for_and_repeats_what_is_short():
    found_N2 = places([1000, 17], [3, 1], 8, 40, 0)
    streams = found_N2[:, 0].tolist()
    assert (streams.count(0), streams.count(1)) == (30, 10)
    short = found_N2[found_N2[:, 0] == 1][:, 1].tolist()
    assert sorted(short) == [0] * 5 + [8] * 5
    long = found_N2[found_N2[:, 0] == 0][:, 1].tolist()
    assert len(set(long)) == 30
    assert streams != sorted(streams)
    assert torch.equal(found_N2, places([1000, 17], [3, 1], 8, 40, 0))
    assert not torch.equal(found_N2, places([1000, 17], [3, 1], 8, 40, 1))
    with pytest.raises(ValueError, match="has 8 tokens, one sample needs 9"):
        places([1000, 8], [1, 1], 8, 10, 0)
