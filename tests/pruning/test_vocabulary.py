"""The choice of entries, and the tokenizers that are rewritten for them: BPE in three forms, and Unigram in two."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.token_counts import template_ids
from nemo_minitron.data.tokenizer import train_tokenizer
from nemo_minitron.evaluation.own_tokens import byte_lengths
from nemo_minitron.families import wrappers
from nemo_minitron.proofs.wrapper_proof import cut_whole, image_logits, tiny_whole
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.slice_wrapper import CutSurroundings
from nemo_minitron.pruning.tokenizer_cut import cut_tokenizer, ids_named, new_ids, renumbered
from nemo_minitron.pruning.tokenizer_file import TokenizerFile
from nemo_minitron.pruning.vocabulary import Construction, choose
from tests.support.fuzzing import examples

TEXT = [
    "the model reads a file and writes the answer to another file while the reader waits\n",
    "for the next line of text because every stage leaves an artifact; 0.5 != 1.25\n\n",
    "Größere Wörter, señor – naïve café 東京 🙂\n",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(folder):
    train_tokenizer(TEXT * 20, 420, folder)


def all_splits(folder):
    """As tiktoken's ranks become a tokenizer.json: every pair that makes an entry is a merge, and whole words first."""
    byte_level(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    pairs = [
        (number, vocab[token[:i]], vocab[token[i:]], [token[:i], token[i:]])
        for token, number in vocab.items()
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab and not token.startswith("<")
    ]
    content["model"] |= {"merges": [pair for *_, pair in sorted(pairs)], "ignore_merges": True}
    path.write_text(json.dumps(content))


def saved(tokenizer, folder):
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken("<image>", special=False)])
    first = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", first)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip


def fallback(folder):
    """As Gemma's and Llama 2's: spaces are marks, and what no entry stands for is written in bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(
        [line.split(" ")[i] + "▁" for line in TEXT * 20 for i in range(3)] + TEXT, trainer
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are entries, and no added tokens
    saved(Tokenizer.from_str(json.dumps(content)), folder)


def unigram(folder, with_bytes=True):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        TEXT * 20, trainers.UnigramTrainer(vocab_size=160, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    )  # fmt: skip
    entries = [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]
    entries += [(byte, -20.0) for byte in BYTES] if with_bytes else []
    tokenizer = Tokenizer(models.Unigram(entries, 0, byte_fallback=with_bytes))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    saved(tokenizer, folder)


KINDS = {
    "byte_level": byte_level, "all_splits": all_splits, "fallback": fallback, "unigram": unigram,
    "unigram_without_bytes": lambda folder: unigram(folder, False),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](place)
    return place


def cut_to(source, target, counts_V, size):
    construction = TokenizerFile(source).construction(len(counts_V))
    kept_V, made = choose(counts_V, construction, size, None)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    cut_tokenizer(target, kept_V)
    return kept_V, made


# pieces of the text that the tokenizers know, and any characters at all
TEXTS = st.lists(
    st.sampled_from("".join(TEXT).split(" ")) | st.text(max_size=6) | st.just(" "), max_size=8
).map("".join)


@given(st.data())
@settings(max_examples=examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_and_kept_entries_are_used_as_before(folder, tmp_path, data):
    before = AutoTokenizer.from_pretrained(folder)
    rows, seed = len(before), data.draw(st.integers(0, 9))
    counts_V = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(seed))
    needed = choose(counts_V, TokenizerFile(folder).construction(rows), None, 1e-9)[1].needed
    size = data.draw(st.integers(needed, rows - 1))
    kept_V, _ = cut_to(folder, tmp_path / "cut", counts_V, size)
    after, ids = AutoTokenizer.from_pretrained(tmp_path / "cut"), new_ids(kept_V)
    alone = Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json"))
    assert sorted(after.get_vocab().values()) == list(range(size))
    lengths_V, used = byte_lengths(after, size), 0
    for text in [*TEXT, *data.draw(st.lists(TEXTS, min_size=5, max_size=15))]:
        old, new = before(text)["input_ids"], after(text)["input_ids"]
        assert after.decode(new) == before.decode(old)
        assert alone.encode(text).ids == new
        if "unigram" not in folder.name:  # which writes a space before a text, and takes it away
            said = after.decode(new, skip_special_tokens=True)
            assert int(lengths_V[new].sum()) == len(said.encode())
        if all(number in ids for number in old):
            used += 1
            assert new == [ids[number] for number in old]
    assert used or size < rows - 2


def test_settings_beside_the_tokenizer_name_the_same_tokens_by_their_new_ids(tmp_path):
    source, target = tmp_path / "source", tmp_path / "cut"
    fallback(source)
    before = AutoTokenizer.from_pretrained(source)
    tokens = {
        name: before.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<image>", "the")
    }
    (source / "generation_config.json").write_text(
        json.dumps(
            {
                "eos_token_id": [tokens["</s>"], tokens["<image>"]],
                "pad_token_id": None,
                "suppress_tokens": [470],
            }
        )
    )
    (source / "added_tokens.json").write_text(json.dumps({"<image>": tokens["<image>"]}))
    (source / "tokenizer.model").write_bytes(b"the same in another form")
    counts_V = torch.zeros(len(before), dtype=torch.int64)
    kept_V, _ = cut_to(source, target, counts_V, 300)
    ids, after = new_ids(kept_V), AutoTokenizer.from_pretrained(target)
    assert (after.bos_token_id, after.eos_token_id) == (ids[tokens["<s>"]], ids[tokens["</s>"]])
    assert after("the")["input_ids"][0] == after.bos_token_id
    assert after.convert_tokens_to_ids("<image>") == ids[tokens["<image>"]]
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [
        after.eos_token_id,
        after.convert_tokens_to_ids("<image>"),
    ]
    assert (
        generation["suppress_tokens"] == [ids[470]]
        if 470 in ids
        else not generation["suppress_tokens"]
    )
    assert (
        json.loads((target / "added_tokens.json").read_text())["<image>"] == ids[tokens["<image>"]]
    )
    assert not (target / "tokenizer.model").exists()
    config = {"bos_token_id": tokens["<s>"], "pad_token_id": -1, "vocab_size": len(before)}
    assert renumbered(config, ids, "config.json")["bos_token_id"] == after.bos_token_id
    gone = next(number for number in range(len(before)) if number not in ids)
    with pytest.raises(
        ValueError, match=f"bos_token_id: {gone} is no entry of the smaller vocabulary"
    ):
        renumbered({"bos_token_id": gone}, ids, "config.json")
    (source / "generation_config.json").write_text('{"forced_decoder_ids": [[1, 2]]}')
    with pytest.raises(
        ValueError, match="forced_decoder_ids names ids in a way that is not rewritten"
    ):
        ids_named(source, config, {})
    with pytest.raises(ValueError, match=r"a special token .* is 999, and the model has"):
        ids_named(target, {"vocab_size": 480}, {"image_token_id": 999})


def test_entries_go_by_their_counts_with_all_that_they_are_made_of():
    construction = Construction(
        frozenset({0, 1, 2}), {4: (1, 2), 5: (4, 3), 6: (0, 1)}, frozenset(range(7))
    )
    counts_V = torch.tensor([1, 1, 1, 0, 0, 9, 3, 0])  # 7 stands for nothing
    kept_V, made = choose(counts_V, construction, 6, None)
    assert kept_V.tolist() == [0, 1, 2, 3, 4, 5]  # 5 is made of 4 and 3, 4 of 1 and 2
    assert (made.entries, made.needed, made.counted, made.covered) == (6, 3, 15, 0.8)
    assert choose(counts_V, construction, 5, None)[0].tolist() == [
        0,
        1,
        2,
        3,
        6,
    ]  # 5 does not fit with its parts
    assert choose(counts_V, construction, None, 0.8)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert choose(counts_V, construction, 8, None)[0].tolist() == list(range(8))
    with pytest.raises(
        ValueError, match=r"plan.vocab: expected at least 3, which any text needs .* found 2"
    ):
        choose(counts_V, construction, 2, None)
    with pytest.raises(ValueError, match=r"plan.vocab and plan.vocab_coverage: give one of them"):
        choose(counts_V, construction, 2, 0.5)


def test_of_several_ways_to_merge_an_entry_the_one_that_happens_keeps_its_parts(tmp_path):
    byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    entries = ["a", "b", "c", "ab", "bc", "abc", "abcb"]
    merges = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]  # abc -> ab c, never a bc
    content["model"] |= {"vocab": {token: i for i, token in enumerate(entries)}, "merges": merges}
    content["added_tokens"] = []
    path.write_text(json.dumps(content))
    assert TokenizerFile(tmp_path).construction(7).parts == {3: (0, 1), 4: (1, 2), 5: (3, 2)}


def test_a_large_vocabulary_comes_in_multiples_that_kernels_like():
    construction = Construction(frozenset(), {}, frozenset(range(1000)))
    counts_V = torch.arange(1000)
    assert [len(choose(counts_V, construction, size, None)[0]) for size in (129, 256, 990)] == [
        256,
        256,
        1000,
    ]
    kept_V, made = choose(counts_V, construction, None, 0.5)
    assert len(kept_V) % 128 == 0 and made.covered >= 0.5
    assert kept_V.tolist() == list(range(1000 - len(kept_V), 1000))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].update(type="WordPiece"), "model.type 'WordPiece'"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix '</w>'"),
        (lambda c: c["model"].update(dropout=0.1), "model.dropout '0.1'"),
    ],
)
def test_what_is_not_cut_is_refused_by_name(tmp_path, change, words):
    byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"only tokenizers of tokenizer.json with BPE or Unigram"
    ) as refused:
        TokenizerFile(tmp_path)
    assert words in str(refused.value) and str(path) in str(refused.value)


def test_a_tokenizer_in_another_form_or_with_code_of_its_own_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected tokenizer.json, found tokenizer.model"):
        TokenizerFile(tmp_path)
    byte_level(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="code of its own"):
        TokenizerFile(tmp_path)


def test_a_token_beyond_the_model_is_refused_by_name(tmp_path):
    byte_level(tmp_path)
    last = len(AutoTokenizer.from_pretrained(tmp_path)) - 1
    with pytest.raises(ValueError, match=f"is {last}, and the model has {last} entries"):
        TokenizerFile(tmp_path).construction(last)


def test_what_a_chat_template_writes_is_found_without_running_it(tmp_path):
    byte_level(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert template_ids(tokenizer) == set()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'file\\n' + m['role'] }} model{% endfor %}{{ 1 / 0 }}"
    )
    (model,) = tokenizer(" model")["input_ids"]
    (newline,) = tokenizer("\n")["input_ids"]
    assert {model, newline, *tokenizer("assistant")["input_ids"]} <= template_ids(tokenizer)


@pytest.mark.parametrize(
    ("name", "kind"), [("gemma3", "gemma3_text"), ("qwen3_vl", "qwen3_vl_text")]
)
def test_a_multimodal_model_finds_its_images_under_their_new_ids(
    tmp_path, tokenizer_folder, name, kind
):
    wrapper = wrappers()[name]
    source = tiny_whole(wrapper, kind, tmp_path / "source", vocab_size=300)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, source)
    kept_V = torch.tensor([*range(40), *range(88, 300)])
    checkpoint = open_checkpoint(source)
    cut = cut_whole(checkpoint, {"vocab": kept_V}, tmp_path / "cut")
    config = json.loads((cut / "config.json").read_text())
    named = {key: value - 48 for key, value in wrapper.proof["config"].items() if "_token_i" in key}
    assert len(named) >= 3 and {key: config[key] for key in named} == named
    assert config["text_config"]["vocab_size"] == len(kept_V)
    moved = dataclasses.replace(
        wrapper, proof={**wrapper.proof, "config": {**wrapper.proof["config"], **named}}
    )
    torch.testing.assert_close(image_logits(cut, moved), image_logits(source, wrapper)[..., kept_V])
    around = CutSurroundings(checkpoint, Cut(checkpoint.architecture, {"vocab": kept_V}, (0,)))
    path = tmp_path / "processor_config.json"
    path.write_text('{"image_token_id": 90, "image_seq_length": 4}')
    assert json.loads(around.processor_file(path)) == {"image_token_id": 42, "image_seq_length": 4}
