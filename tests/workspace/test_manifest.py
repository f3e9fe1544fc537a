import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nemo_minitron.workspace.artifacts import input_artifact, verify, verify_tree
from nemo_minitron.workspace.build import building, make
from nemo_minitron.workspace.condition import condition
from nemo_minitron.workspace.locks import locked
from nemo_minitron.workspace.manifest import Input, fingerprint, read_manifest


def write(text):
    def build(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "file.txt").write_text(text)

    return build


def test_an_artifact_is_made_once_and_made_anew_when_its_recipe_changes(tmp_path):
    folder, inputs = tmp_path / "thing", [Input("data", "abc")]
    assert make(folder, "thing", {"a": 1}, inputs, write("one"))
    assert not make(folder, "thing", {"a": 1}, inputs, write("two"))
    assert (folder / "sub" / "file.txt").read_text() == "one"
    assert make(folder, "thing", {"a": 2}, inputs, write("three"))
    assert make(folder, "thing", {"a": 2}, [Input("data", "abd")], write("four"))
    assert read_manifest(folder).fingerprint == fingerprint(
        "thing", {"a": 2}, [Input("data", "abd")]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing"]


def test_an_input_that_was_made_anew_makes_its_followers_anew(tmp_path):
    make(tmp_path / "first", "first", {}, [], write("1"))
    old = input_artifact(tmp_path, "first", "first")
    assert make(tmp_path / "second", "second", {}, [old], write("2"))
    assert not make(tmp_path / "second", "second", {}, [old], write("2"))
    (tmp_path / "first" / "sub" / "file.txt").unlink()
    assert make(tmp_path / "first", "first", {}, [], write("1"))
    new = input_artifact(tmp_path, "first", "first")
    assert new.fingerprint == old.fingerprint
    assert make(tmp_path / "second", "second", {}, [new], write("2"))


def test_a_failed_build_leaves_nothing_and_keeps_what_was_there(tmp_path):
    make(tmp_path / "thing", "thing", {"a": 1}, [], write("good"))

    def fail(folder):
        write("half")(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "thing", "thing", {"a": 2}, [], fail)
    assert verify(tmp_path / "thing") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing"]


def test_verify_names_every_defect(tmp_path):
    folder = tmp_path / "thing"

    def build(target):
        for name in ("a", "b", "c", "d"):
            (target / name).write_text("0123456789")

    make(folder, "thing", {"x": 1}, [], build)
    assert verify(folder) == []
    (folder / "a").write_text("0123456780")
    (folder / "b").write_text("short")
    (folder / "c").unlink()
    problems = "\n".join(verify(folder))
    assert f"{folder / 'a'}: SHA-256" in problems
    assert f"{folder / 'b'}: expected 10 bytes, found 5" in problems
    assert f"{folder / 'c'}: missing" in problems
    assert "/d:" not in problems
    (folder / "stray").write_text("x")
    assert f"{folder / 'stray'}: not in the manifest" in verify(folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["config"]["x"] = 2
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert any("fingerprint" in problem for problem in verify(folder))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a manifest"):
        read_manifest(folder)
    assert condition(folder, "x", []).state == "damaged"


def test_what_carries_no_manifest_is_said_so(tmp_path):
    with pytest.raises(ValueError, match="neither artifact nor workspace"):
        verify_tree(tmp_path)
    with pytest.raises(ValueError, match="run 'minitron score' first"):
        input_artifact(tmp_path, "scores", "score")


KILLED = """
import sys, time
from pathlib import Path
from nemo_minitron.workspace.build import make
def build(folder):
    (folder / "weights").write_bytes(b"x" * 1000)
    print("half", flush=True)
    time.sleep(60)
make(Path(sys.argv[1]) / "thing", "thing", {}, [], build)
"""


def test_a_build_killed_in_the_middle_looks_like_nothing_and_is_cleared_by_the_next(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "thing").exists()
    assert make(tmp_path / "thing", "thing", {}, [], write("whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing"]


LOCKER = """
import sys, time
from pathlib import Path
from nemo_minitron.workspace.condition import condition
from nemo_minitron.workspace.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_workspace_is_held_by_one_run_and_released_by_its_death(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another run is using it"), locked(tmp_path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with locked(tmp_path):
                return
        except ValueError:
            time.sleep(0.05)
    raise AssertionError("the lock outlived its holder")


def test_the_temporary_folder_takes_the_targets_place_only_at_the_end(tmp_path):
    with building(tmp_path / "a") as folder:
        (folder / "f").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "f").read_text() == "1"
