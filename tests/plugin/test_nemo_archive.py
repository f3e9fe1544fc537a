"""A .nemo archive of a stranger's reaches nothing outside of itself."""

import io
import shutil
import struct
import tarfile
import zlib
from collections import Counter

import pytest
import yaml
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

from nemo_minitron.cli.main import main
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.nemo_archive import check_archive
from tests.support.fuzz_archive import cases
from tests.support.fuzz_workspace import PYTHON
from tests.support.fuzzing import SEED, some, tally


@pytest.fixture(scope="module")
def good(once, teacher):
    def write(folder):
        (teacher / "tokenizer.json").stat()
        MinitronModel.from_hf(teacher, dtype="auto").save_to(str(folder / "good.nemo"))

    return once("archive", write) / "good.nemo"


def altered(good, path, change, config_name="./model_config.yaml"):
    """A copy of an archive with another configuration: ``change`` gets the old one and returns the new text."""
    with tarfile.open(good) as old, tarfile.open(path, "w") as new:
        for member in old.getmembers():
            content = old.extractfile(member).read() if member.isfile() else b""
            if member.name.endswith("model_config.yaml"):
                content = change(yaml.safe_load(content))
                content = (
                    content if isinstance(content, bytes) else yaml.safe_dump(content).encode()
                )
                member.name, member.size = config_name, len(content)
            new.addfile(member, io.BytesIO(content))
    return path


def with_file(key, value):
    return lambda config: {**config, "files": {**config["files"], key: value}}


def a_member(config):
    return next(value for value in config["files"].values())


TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
ATTACKS = {
    "write anywhere, absolute": (lambda c, o: with_file(f"{o}/written", a_member(c))(c), "is no name of a file"),
    "write anywhere, upwards": (
        lambda c, o: with_file("__dot____dot__/__dot____dot__/written", a_member(c))(c), "is no name of a file",
    ),
    "write config.json": (lambda c, o: with_file("config__dot__json", a_member(c))(c), "is no name of a file"),
    "write python": (lambda c, o: with_file("sitecustomize__dot__py", a_member(c))(c), "is no name of a file"),
    "read anything": (lambda c, o: with_file("LICENSE", f"{o}/secret")(c), "is no file of the archive"),
    "read upwards": (lambda c, o: with_file("LICENSE", f"nemo:../../../{o}/secret")(c), "is no file of the archive"),
    "read what is not there": (lambda c, o: with_file("LICENSE", "nemo:absent")(c), "is no file of the archive"),
    "read the environment": (
        lambda c, o: {**c, "hf_config": {**c["hf_config"], "note": "${oc.env:HF_TOKEN}"}}, "refers to something outside",
    ),
    "read the environment as a key": (
        lambda c, o: {**c, "hf_config": {**c["hf_config"], "x": {"${oc.env:HF_TOKEN}": 1}}}, "refers to something outside",
    ),
    "grow without end": (
        lambda c, o: b"a: &a [1, 1]\nb: [*a, *a]\n" + yaml.safe_dump(c).encode(), "holds YAML aliases",
    ),
    "call something as a dtype": (lambda c, o: {**c, "dtypes": {"load": ["model.lm_head.weight"]}}, "dtypes: expected some of"),
    "another model inside": (
        lambda c, o: {**c, "model": {"hf_config": {}, "_target_": TOKENIZER, "name": str(o)}},
        "model: no entry of an archive",
    ),
    "a class with arguments": (
        lambda c, o: {**c, "cls": TOKENIZER, "params": {"pretrained_model_name": str(o)}}, "cls: no entry of an archive",
    ),
    "another class": (lambda c, o: {**c, "target": "torch.nn.Identity"}, "target: expected nemo_minitron.plugin.model.MinitronModel"),
    "a call when it is trained": (
        lambda c, o: {**c, "optim": {"name": "adamw", "sched": {"args": {"_target_": TOKENIZER}}}}, "is not called",
    ),
    "a call by another name": (
        lambda c, o: {**c, "optim": {"_target_": "torch.optim.adamw.torch.hub.load"}}, "is not called",
    ),
    "read the environment in passing": (
        lambda c, o: {**c, "train_ds": {"paths": ["${oc.env:HF_TOKEN}"]}}, "refers to something outside",
    ),
    "no configuration": (lambda c, o: b"[1, 2", "is no configuration"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_reaches_out_is_refused_whoever_restores_it(tmp_path, capsys, monkeypatch, good, name):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("of the user's")
    change, message = ATTACKS[name]
    archive = altered(good, tmp_path / "a.nemo", lambda config: change(config, outside))
    words = [
        f"source.model={archive}",
        "score.importance=magnitude",
        "plan.ffn=8",
        f"workspace={tmp_path / 'ws'}",
    ]
    assert main(["prune", *words]) == 2
    said = capsys.readouterr().err
    assert message in said, said
    assert "hf_secret" not in said
    with pytest.raises(ValueError, match=message):
        MinitronModel.restore_from(str(archive), map_location="cpu")
    assert [path.name for path in outside.iterdir()] == ["secret"]
    kept = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path not in (archive, outside / "secret")
    ]
    assert not any(
        b"of the user's" in path.read_bytes() or b"hf_secret" in path.read_bytes() for path in kept
    )


def test_damaged_archives_are_models_or_one_clear_error(tmp_path, capsys, good):
    outcomes = Counter()
    for name, build in some(cases(SEED), 15):
        folder = tmp_path / "case"
        folder.mkdir()
        build(good, folder / "a.nemo")
        code = main(["download", f"source.model={folder / 'a.nemo'}", f"workspace={folder / 'ws'}"])
        said = capsys.readouterr().err
        assert code in (0, 2) and not PYTHON.search(said), (name, said)
        lines = [line for line in said.splitlines() if line.startswith("minitron download: ")]
        assert len(lines) == (code == 2), (name, said)
        assert [path.name for path in tmp_path.iterdir()] == ["case"], name
        shutil.rmtree(folder)
        outcomes["refused" if code else "read"] += 1
    tally(".nemo archives", outcomes)


def test_the_configuration_that_is_checked_is_the_one_that_nemo_reads(tmp_path, good):
    """An innocent one in a sub-folder, the other one at the top."""
    bad = altered(good, tmp_path / "bad.nemo", with_file("LICENSE", "/etc/hostname"))
    both = tmp_path / "both.nemo"
    with tarfile.open(both, "w") as new:
        for source, folder in ((good, "./inner"), (bad, ".")):
            with tarfile.open(source) as old:
                for member in old.getmembers():
                    if member.isfile():
                        content = old.extractfile(member).read()
                        member.name = f"{folder}/{member.name.removeprefix('./')}"
                        new.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="is no file of the archive"):
        check_archive(both)


def test_after_a_refusal_models_are_built_as_before(tmp_path, good, teacher):
    bad = altered(
        good, tmp_path / "bad.nemo", lambda config: {**config, "dtypes": {"float32": ["absent"]}}
    )
    with pytest.raises(ValueError, match=r"dtypes\.float32: the model has no parameter 'absent'"):
        MinitronModel.restore_from(str(bad), map_location="cpu")
    MinitronModel.from_hf(teacher)  # whose files are not an archive's
    restored = MinitronModel.restore_from(str(good), map_location="cpu")
    assert restored.side_files["tokenizer.json"] == (teacher / "tokenizer.json").read_bytes()


def two_in_one(hidden, shown):
    """A gzip file of one tar whose header (RFC 1952, field FEXTRA) is another tar, from the first byte on."""

    def block(name, content):
        head = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
        head[:100] = name.ljust(100, b"\0")
        head[124:136] = b"%011o\0" % len(content)
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head) + content + b"\0" * (-len(content) % 512)

    rest = block(b"model_config.yaml", hidden) + b"\0" * 1024
    begin = b"\x1f\x8b\x08\x04" + b"\0" * 5 + b"\xff" + struct.pack("<H", 512 - 12 + len(rest))
    packed = zlib.compressobj(wbits=-15)
    body = packed.compress(shown) + packed.flush()
    return (
        block(begin, b"") + rest + body + struct.pack("<II", zlib.crc32(shown), len(shown) % 2**32)
    )


def test_a_file_that_is_two_archives_is_checked_as_the_one_that_nemo_unpacks(tmp_path, good):
    both = tmp_path / "both.nemo"
    evil = yaml.safe_dump({"hf_config": {}, "model": {"_target_": TOKENIZER}}).encode()
    both.write_bytes(two_in_one(evil, good.read_bytes()))
    with (
        tarfile.open(both) as archive,
        tarfile.open(good) as shown,
    ):  # looks for a compressed one first
        assert archive.getnames() == shown.getnames()
    with SaveRestoreConnector._tar_open(str(both)) as archive:
        assert archive.getnames()[1:] == ["model_config.yaml"]
    with pytest.raises(ValueError, match="model: no entry of an archive"):
        check_archive(both)
