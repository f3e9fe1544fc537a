"""Damaged, truncated, hostile and empty data files: read, or refused by name; never a crash, never in silence."""

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nemo_minitron.cli.main import main
from nemo_minitron.data import compressed_files, row_files
from nemo_minitron.data.documents import documents
from nemo_minitron.data.windows import pack
from nemo_minitron.models.causal_lm import load_tokenizer
from tests.data.test_documents import write_megatron
from tests.support.fuzz_data import cases
from tests.support.fuzzing import SEED, some, tally
from tests.support.text_samples import found

PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}
WORDS = "".join(f"the model reads file {number * number}\n" for number in range(20_000))


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch):
    monkeypatch.setattr(compressed_files, "_told", set())
    monkeypatch.setattr(compressed_files, "_counted", type(compressed_files._counted)())


@pytest.mark.parametrize("left", [0.5, -4])
@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("name", ["cut.txt", "cut.jsonl"])
def test_a_truncated_compressed_file_is_refused_by_its_name(tmp_path, name, kind, left):
    rows = "".join(json.dumps({"text": line}) + "\n" for line in WORDS.splitlines())
    raw = PACKERS[kind]((rows if "json" in name else WORDS).encode())
    (tmp_path / f"{name}.{kind}").write_bytes(raw[: int(len(raw) * left) if left > 0 else left])
    with pytest.raises(ValueError, match=rf"data\.train: .*{name}\.{kind} is damaged or cut short"):
        list(documents(found([tmp_path])))


@pytest.mark.parametrize("kind", PACKERS)
def test_a_file_that_is_no_archive_and_damaged_bytes_are_refused_by_name(tmp_path, kind):
    raw = bytearray(PACKERS[kind](WORDS.encode()))
    raw[len(raw) // 2] ^= 0xFF
    raw[len(raw) // 2 + 1] ^= 0xFF
    for name, content in (("bits", bytes(raw)), ("plain", b"just words, not compressed at all")):
        (tmp_path / f"{name}.txt.{kind}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.txt\.{kind} is damaged or cut short"):
            list(documents(found([tmp_path / f"{name}.txt.{kind}"])))


def test_whole_zst_files_of_several_frames_are_read(tmp_path):
    pack_frame = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    frames = [
        pack_frame(b"one "),
        skippable,
        pack_frame(b"two "),
        pack_frame(b""),
        pack_frame(b"three"),
    ]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert list(documents(found([tmp_path]))) == ["one two three"]


@pytest.mark.parametrize("kind", PACKERS)
def test_a_damaged_stream_behind_others_is_not_taken_for_their_end(tmp_path, kind):
    """As pbzip2 and 'cat' write them: Python's readers take what they cannot read for padding."""
    whole = [PACKERS[kind](part) for part in (b"one ", b"two ", b"three")]
    path = tmp_path / f"a.txt.{kind}"
    path.write_bytes(b"".join(whole))
    assert list(documents(found([path]))) == ["one two three"]
    damaged = bytes([whole[1][0] ^ 0xFF]) + whole[1][1:]
    for rest in (damaged + whole[2], whole[1] + b"garbage", whole[1] + whole[2][:7]):
        path.write_bytes(whole[0] + rest)
        with pytest.raises(ValueError, match=rf"a\.txt\.{kind} is damaged or cut short"):
            list(documents(found([path])))
    path.write_bytes(whole[0] + bytes(5000))  # padding of zeros holds nothing
    if kind != "zst":
        assert list(documents(found([path]))) == ["one "]


def test_of_an_archive_with_several_files_none_is_left_out_in_silence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("__MACOSX/._a.jsonl", b"\0")
        archive.writestr("folder/", b"")
        archive.writestr("folder/a.jsonl", '{"text": "one"}\n')
    assert list(documents(found([tmp_path]))) == ["one"]
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "a") as archive:
        archive.writestr("b.jsonl", '{"text": "two"}\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl\.zip is damaged .*of 2 files, expected one; un"
    ):
        list(documents(found([tmp_path])))


@pytest.mark.parametrize(
    "name", ["a.JSONL", "a.ndjson", "a.Json.GZ", "a.jsonl.zip", "a.jsonl.lzma"]
)
def test_rows_are_not_read_as_text_because_of_how_a_name_is_written(tmp_path, name):
    row = b'{"text": "one"}\n'
    packed = {".GZ": gzip.compress(row), ".lzma": lzma.compress(row, lzma.FORMAT_ALONE)}
    path = tmp_path / name
    path.write_bytes(packed.get(path.suffix, row))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", row)
    assert list(documents(found([path]))) == ["one"]


def test_rows_that_are_read_as_text_are_said_so(tmp_path, capsys):
    for name, text in (
        ("part-0", '{"text": "a"}\n{"text": "b"}\n'),
        ("b", "{a} of b"),
        ("c", "{" * 9),
    ):
        (tmp_path / name).write_text(text)
    assert len(list(documents(found([tmp_path])))) == 3
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "part-0 holds rows of JSON, and is read as text; data.tr" in said
    )
    assert list(documents(found([tmp_path / "part-0"], format="jsonl"))) == ["a", "b"]
    assert not capsys.readouterr().err


def test_one_of_many_shards_is_named_and_so_is_its_row(tmp_path):
    for number in range(40):
        row = json.dumps({"text": f"shard {number}"})
        (tmp_path / f"{number:02}.jsonl").write_text(f"{row}\n{row}\n")
    (tmp_path / "17.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "never ends\n')
    with pytest.raises(ValueError, match=r"data\.train: .*17\.jsonl, row 3: not valid JSON: "):
        list(documents(found([tmp_path])))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "expected an object, found null"),
        ("5", "expected an object, found a number"),
        ('"words"', "expected an object, found text"),
        ('{"text": null}', r"under 'text', found null there"),
        ('{"text": 5}', r"under 'text', found a number there"),
        ('{"text": ["a"]}', r"under 'text', found a list there"),
        ('{"body": "x"}', r"under 'text', found \['body'\]"),
        ("[" * 50_000, "nested more than 100 deep"),
        ('{"text":' * 50_000, "nested more than 100 deep"),
        ('{"text": "x", "more": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100 deep"),
        ('{"text": "a \\ud800 b"}', "surrogate"),
        ('{"text": "a" "b"}', r"not valid JSON: Expecting ',' delimiter"),
        ('{"text": "x", "n": ' + "9" * 5000 + "}", "limit"),
        ('{"messages": [{"role": "user", "content": 5}]}', "the content of a message .* found a number"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "found a part of type 'image_url'"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_text_is_refused_by_file_and_row(tmp_path, line, message):
    good = '{"text": "good"}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{good}\n{line}\n{good}\n")
    begins = time.monotonic()
    with pytest.raises(ValueError, match=rf"data\.train: .*a\.jsonl, row 3: .*{message}"):
        list(documents(found([tmp_path])))
    assert time.monotonic() - begins < 10


def test_lines_of_null_and_deep_lines_do_not_end_the_process(tmp_path):
    (tmp_path / "null.jsonl").write_text("null\n" * 1000)
    (tmp_path / "deep.jsonl").write_text("[" * 50_000 + "]" * 50_000 + "\n")
    code = (
        "import sys\nfrom nemo_minitron.data.documents import documents, find_text\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        list(documents(find_text([name], [], 'auto', 'text', 'data.train')))\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    files = [str(tmp_path / name) for name in ("null.jsonl", "deep.jsonl")]
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    for line, name in zip(done.stdout.splitlines(), ("null", "deep"), strict=True):
        assert f"{name}.jsonl, row 1: " in line


def test_json_in_every_shape_it_comes_in(tmp_path):
    rows = [{"text": f"row {number} " + "words " * 50_000, "id": number} for number in range(12)]
    texts = [row["text"] for row in rows]
    shapes = {
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "blank_lines.jsonl": "\r\n \n".join(json.dumps(row) for row in rows),
        "one_line.jsonl": "".join(map(json.dumps, rows)),
        "bom.jsonl": "\ufeff" + "\n".join(map(json.dumps, rows)),
        "array.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2),
        "pretty_rows.json": "\n".join(json.dumps(row, indent=1) for row in rows),
        "strings.json": json.dumps(texts),
    }
    for name, content in shapes.items():
        (tmp_path / name).write_text(content)
        assert list(documents(found([tmp_path / name]))) == texts, name
    for content, message in (
        ("[1]", "found a number"),
        ('["a", ', "does not end"),
        ('["a"] 5', "follows"),
    ):
        (tmp_path / "array.json").write_text(content)
        with pytest.raises(ValueError, match=rf"array\.json, row \d: .*{message}"):
            list(documents(found([tmp_path / "array.json"])))


def test_empty_files_beside_good_ones_are_passed_over_with_a_note(
    tmp_path, tokenizer_folder, capsys
):
    import datasets

    (tmp_path / "good.jsonl").write_text('{"text": "the model reads a file"}\n' * 5)
    empty = {"a.jsonl": b"", "b.json": b"", "c.json": b"[]", "d.txt": b"", "e.parquet": b""}
    empty |= {f"f.jsonl.{kind}": packer(b"") for kind, packer in PACKERS.items()}
    for name, content in empty.items():
        (tmp_path / name).write_bytes(content)
    none = datasets.Dataset.from_dict({"text": ["x"]}).select([])
    none.to_parquet(tmp_path / "g.parquet")
    assert list(documents(found([tmp_path]))) == ["the model reads a file"] * 5
    said = capsys.readouterr().err
    assert said.count("is empty and is passed over") == 9  # eight by name, and that there are more
    tokenizer = load_tokenizer(tokenizer_folder, 300)
    for name in (*empty, "g.parquet"):
        with pytest.raises(
            ValueError, match=rf"data\.train\.paths: 1 files hold no text: .*{name}"
        ):
            pack(found([tmp_path / name]), tokenizer, 8, None, 0)


def test_damaged_parquet_and_saved_sets_are_refused_by_name(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"row {number} " * 50 for number in range(500)]})
    rows.to_parquet(tmp_path / "good.parquet")
    raw = (tmp_path / "good.parquet").read_bytes()
    for name, content in (("magic", raw[4:]), ("half", raw[: len(raw) // 2]), ("words", b"words")):
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name}\.parquet cannot be read as parquet after row 0"
        ):
            list(documents(found([tmp_path / f"{name}.parquet"])))
    rows.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"saved cannot be read as a saved data set"):
        list(documents(found([tmp_path / "saved"])))
    none = datasets.Dataset.from_dict({"text": ["a", None]})
    none.to_parquet(tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=r"null\.parquet, row 2: .* found null there"):
        list(documents(found([tmp_path / "null.parquet"])))


def test_a_row_longer_than_the_limit_is_refused_by_name_and_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LONGEST_ROW", 3_000_000)
    for name, length in (("fits", 2_900_000), ("long", 3_100_000), ("bomb", 60_000_000)):
        line = json.dumps({"text": "x" * length})
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", compresslevel=1) as file:
            file.write('{"text": "a"}\n' + line + "\n")
    assert len(list(documents(found([tmp_path / "fits.jsonl.gz"])))) == 2
    for name in ("long", "bomb"):
        with pytest.raises(
            ValueError, match=rf"{name}\.jsonl\.gz, row 2: longer than 3,000,000 characters"
        ):
            list(documents(found([tmp_path / f"{name}.jsonl.gz"])))


def rewritten(path, start, dtype, number):
    raw = bytearray(path.read_bytes())
    value = np.array([number], dtype).tobytes()
    raw[start : start + len(value)] = value
    path.write_bytes(bytes(raw))


LENGTHS, OFFSETS, BOUNDS = 34, 34 + 12, 34 + 36


@pytest.mark.parametrize(
    ("start", "dtype", "number", "message"),
    [
        (OFFSETS + 8, "<i8", -800, "an offset is negative"),
        (OFFSETS + 8, "<i8", -(10**15), "an offset is negative"),
        (OFFSETS + 8, "<i8", 2**63 - 2, "beyond the end of the data"),
        (OFFSETS + 8, "<i8", 7, "no multiple of the 2 bytes"),
        (LENGTHS, "<i4", -1, "a length is negative"),
        (LENGTHS, "<i4", 2**31 - 1, "beyond the end of the data"),
        (BOUNDS + 8, "<i8", 4, "its documents"),
        (18, "<u8", 2**64 - 1, ""),
    ],
)
def test_a_megatron_index_that_points_elsewhere_is_refused(tmp_path, start, dtype, number, message):
    write_megatron(tmp_path / "set", [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [0, 2, 3])
    assert len(list(documents(found([tmp_path])))) == 2
    rewritten(tmp_path / "set.idx", start, dtype, number)
    with pytest.raises(
        ValueError, match=rf"data\.train: .*set\.idx: not a usable index: .*{message}"
    ):
        list(documents(found([tmp_path])))


def test_megatron_documents_out_of_order_are_refused(tmp_path):
    write_megatron(tmp_path / "set", [[5, 6, 7], [8, 9], [10, 11]], [0, 3, 1, 3])
    with pytest.raises(ValueError, match="its documents are not in order"):
        list(documents(found([tmp_path])))


def test_a_file_that_is_not_utf_8_gets_a_note_and_json_is_refused(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("Grüße, größer und schöner".encode("latin-1"))
    (tmp_path / "good.txt").write_text("Grüße \ufffd")
    replaced = "Gr\ufffd\ufffde, gr\ufffd\ufffder und sch\ufffdner"
    assert set(documents(found([tmp_path]))) == {replaced, "Grüße \ufffd"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "latin.txt is not UTF-8" in line and "(5 times so far)" in line
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "Grüße"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl, row \d: the file is not UTF-8"):
        list(documents(found([tmp_path / "latin.jsonl"])))


def test_a_long_value_that_many_rows_share_is_in_memory_once_at_a_time(tmp_path):
    value = "x" * 4_000_000
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 64), pa.array([value, "y"]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 5_000
    code = (
        "import pathlib, sys, pyarrow\nfrom nemo_minitron.data.row_files import parquet_rows\n"
        "rows = sum(1 for _ in parquet_rows(pathlib.Path(sys.argv[1]), 'data'))\n"
        "print(rows, pyarrow.default_memory_pool().max_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, check=True
    )
    rows, most = map(int, done.stdout.split())
    assert rows == 128 and most < 10 * len(value)


@pytest.mark.parametrize("name", ["cut.txt.zst", "rows.jsonl", "rows.parquet"])
def test_the_command_line_exits_with_2_and_one_line(tmp_path, teacher, capsys, name):
    raw = zstandard.ZstdCompressor().compress(WORDS.encode())
    (tmp_path / name).write_bytes(raw[:-4] if "zst" in name else b'{"text": "a"}\n{"te')
    code = main(["score", f"source.model={teacher}", f"workspace={tmp_path}/w",
                 f"data.calibration.paths=[{tmp_path / name}]", "data.calibration.samples=2"])  # fmt: skip
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron")]
    assert code == 2 and str(tmp_path / name) in line and "failed" not in line


def test_generated_damaged_files_are_read_or_refused_by_name(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder, 300)
    (tmp_path / "good.txt").write_text("the model reads a file " * 50)
    outcomes = Counter()
    for name, build in some(cases(SEED + 1), 60):
        folder = tmp_path / "case"
        folder.mkdir()
        path = build(folder)
        begins = time.monotonic()
        try:
            texts = found([path, tmp_path / "good.txt"])
            if not any(isinstance(document, list) for document in documents(texts)):
                assert len(pack(texts, tokenizer, 16, None, 0).samples)
            outcomes["read"] += 1
        except ValueError as error:
            assert str(path.with_suffix("")) in str(error) or "do not fit the tokenizer" in str(
                error
            ), name
            outcomes["refused"] += 1
        assert time.monotonic() - begins < 20, name
        shutil.rmtree(folder)
    assert min(outcomes["read"], outcomes["refused"]) > 10
    tally("data files", outcomes)
