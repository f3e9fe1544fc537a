"""What is held out of small sets, and trainings of which nothing is learned."""

import datetime
import decimal
import json

import pytest

from nemo_minitron.config.compose import load_config
from nemo_minitron.data.document_types import draw_of
from nemo_minitron.data.documents import documents
from nemo_minitron.data.training_samples import training_samples
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.models.ranks import Ranks
from tests.support.text_samples import found

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_talks(path, count, roles=("user", "assistant")):
    rows = [[{"role": role, "content": f"{role} {i}"} for role in roles] for i in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return rows


def both_sides(paths, holdout=0.05):
    return [list(documents(found(paths, side, holdout))) for side in ("train", "held_out")]


@pytest.mark.parametrize("count", [2, 3, 5, 8, 12])
def test_of_few_conversations_whole_ones_are_held_out_not_all_answers(tmp_path, count):
    rows = write_talks(tmp_path / "chat.jsonl", count)
    train, held_out = both_sides([tmp_path])
    assert train and held_out and len(train) + len(held_out) == count
    assert all(row in train or row in held_out for row in rows)


def test_copies_of_a_conversation_stay_on_one_side(tmp_path):
    rows = write_talks(tmp_path / "chat.jsonl", 2)
    lines = "".join(json.dumps({"messages": rows[i % 2]}) + "\n" for i in range(20))
    (tmp_path / "chat.jsonl").write_text(lines)
    train, held_out = both_sides([tmp_path])
    assert len(train) == len(held_out) == 10 and train[0] != held_out[0]


def test_conversations_with_what_is_no_json_are_split_and_the_others_as_before(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def message(number):
        more = {"at": datetime.datetime(2024, 1, 1, number), "cost": decimal.Decimal(number)}
        return {"role": "user", "content": f"question {number}", "key": bytes([number]), **more}

    rows = [[message(number)] for number in range(20)]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "talks.parquet")
    train, held_out = both_sides([tmp_path])
    assert train and held_out and sorted(map(str, train + held_out)) == sorted(map(str, rows))
    assert draw_of([message(1)]) == draw_of([message(1)]) != draw_of([message(2)])
    assert draw_of([{"role": "user", "content": "hello"}]) == 14125171550728176703
    # what Python shows by its address alone falls on one side in every process
    one, other = Image(), Image()
    assert draw_of([{"role": "user", "image": one}]) == draw_of([{"role": "user", "image": other}])


class Image:
    """Shown as an object at an address."""


def test_one_conversation_alone_cannot_be_split_and_is_refused_clearly(tmp_path):
    write_talks(tmp_path / "chat.jsonl", 1)
    for side in ("train", "held_out"):
        with pytest.raises(
            ValueError, match=r"data\.train: the text is one conversation.*data\.validation\.paths"
        ):
            list(documents(found([tmp_path], side, 0.05)))
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    train, held_out = both_sides([tmp_path], 0.02)
    assert sum(isinstance(document, list) for document in train) == 1
    assert [type(document) for document in held_out] == [str]


def drawn_as_held_out(share):
    """A text whose number lies in the held-out share."""
    from nemo_minitron.data.document_types import draw_of

    texts = ("".join(f"line {i} of {n}\n" for i in range(200)) for n in range(10_000))
    return next(text for text in texts if draw_of(text) < share * 2**64)


@pytest.mark.parametrize("copies", [1, 30])
def test_one_document_in_the_held_out_share_and_copies_of_it_are_not_no_text(tmp_path, copies):
    text = drawn_as_held_out(0.05)
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": text}) + "\n") * copies)
    train, held_out = both_sides([tmp_path])
    assert len(train) == len(held_out) == copies
    assert train[0] + held_out[0] == text
    assert len(held_out[0]) == pytest.approx(0.05 * len(text), rel=0.02)


def learned(tmp_path, tokenizer_folder, learn_from="answers"):
    tokenizer = load_tokenizer(tokenizer_folder, 300)
    tokenizer.chat_template = CHAT
    config = load_config("config", [
        f"workspace={tmp_path / 'w'}", f"data.train.paths=[{tmp_path / 'chat.jsonl'}]",
        "data.train.sequence_length=16", f"data.train.learn_from={learn_from}",
    ])  # fmt: skip
    return training_samples(config, tokenizer, 4, 4, Ranks())


@pytest.mark.parametrize("roles", [("user", "user"), ("human", "gpt")])
def test_a_training_of_answers_without_any_answer_is_refused(tmp_path, tokenizer_folder, roles):
    write_talks(tmp_path / "chat.jsonl", 30, roles)
    with pytest.raises(
        ValueError, match=r"data\.train: learn_from=answers, but none of \d+ samples"
    ):
        learned(tmp_path, tokenizer_folder)


def test_of_few_conversations_the_answers_are_learned(tmp_path, tokenizer_folder, capsys):
    write_talks(tmp_path / "chat.jsonl", 8)
    samples = learned(tmp_path, tokenizer_folder)
    assert any((samples[i][1:] > 1).any() for i in range(len(samples)))
    assert "learn_from" not in capsys.readouterr().err


def test_text_without_conversations_is_learned_whole_and_that_is_said(
    tmp_path, tokenizer_folder, capsys
):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"text": "one line of prose. " * 60}) + "\n")
    learned(tmp_path, tokenizer_folder)
    assert "learn_from=answers, and every token is learned" in capsys.readouterr().err


def test_a_conversation_that_begins_with_the_assistant_is_named_where_only_answers_count(
    tmp_path, tokenizer_folder
):
    write_talks(tmp_path / "chat.jsonl", 3, ("assistant", "user"))
    with pytest.raises(
        ValueError,
        match=r"chat\.jsonl, row \d: .*the conversation begins with the assistant; use data\.train\.learn_from=all",
    ):
        learned(tmp_path, tokenizer_folder)
    assert len(learned(tmp_path, tokenizer_folder, "all"))
