"""A file or folder is old or new, never a part: at real kills, at every call that the system is asked for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.workspace import atomic
from nemo_minitron.workspace.atomic import (
    clear,
    discard,
    is_leftover,
    leftovers_of,
    replaced_in,
    replacing,
    replacing_folder,
    standing,
)

WRITING = """
import os, signal, sys
from pathlib import Path
from nemo_minitron.workspace.atomic import replacing, replacing_folder
path, kind, wanted = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = []
def watch(event, arguments):
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open") and str(path.parent) in str(arguments):
        seen.append(event)
        if len(seen) == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
if kind == "file":
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write("new" * 10_000)
        file.flush()
else:
    with replacing_folder(path) as temporary:
        for name in "ab":
            (temporary / name).write_text("new")
"""


def killed_at(path, kind, call):
    """Whether a process that replaces was killed before the call of that number; else it came to its end."""
    done = subprocess.run(
        [sys.executable, "-c", WRITING, str(path), kind, str(call)], check=False, timeout=60
    )
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def test_a_file_killed_at_any_moment_is_the_old_one_or_the_new_one(tmp_path):
    path, found = tmp_path / "thing.json", set()
    for call in range(1, 20):
        path.write_text("old")
        killed = killed_at(path, "file", call)
        assert path.read_text() in ("old", "new" * 10_000)
        found.add((killed, path.read_text()[:3]))
        assert all(file == path or is_leftover(file.name) for file in tmp_path.iterdir())
        if not killed:
            break
    assert found == {(True, "old"), (False, "new")}
    assert list(tmp_path.iterdir()) == [path]  # what was left has gone, too


def content(folder):
    return [(path.name, path.read_text()) for path in sorted(folder.iterdir())]


def test_a_folder_killed_at_any_moment_stands_whole_and_the_next_clears_up(tmp_path):
    path, whole = tmp_path / "part-0", {"old": [("c", "old")], "new": [("a", "new"), ("b", "new")]}
    kills, beside = 0, 0
    for call in range(1, 60):
        clear(path)
        path.mkdir()
        (path / "c").write_text("old")
        killed = killed_at(path, "folder", call)
        there = standing(path)
        assert content(there) in whole.values()
        assert replaced_in(tmp_path, "part-*") == [path]
        beside += there != path
        assert all(found == path or found in leftovers_of(path) for found in tmp_path.iterdir())
        assert all(found == path or is_leftover(found.name) for found in tmp_path.iterdir())
        if not killed:
            break
        kills += 1
        with replacing_folder(path) as temporary:
            (temporary / "a").write_text("later")
        assert content(path) == [("a", "later")] and standing(path) == path
        assert list(tmp_path.iterdir()) == [path]
    assert not killed and kills > 5 and beside >= 1
    assert content(path) == whole["new"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_one_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(type(error)), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(type(error)), replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "half").write_text("half")
        raise error
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass  # nothing was written
    assert (tmp_path / "file").read_text() == "old" and content(tmp_path / "folder") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("sync", [True, False])
def test_bytes_are_on_the_disk_before_they_take_the_place(tmp_path, monkeypatch, sync):
    done = []
    monkeypatch.setattr(
        os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    with replacing(tmp_path / "file", sync) as temporary:
        temporary.write_text("new")
    with replacing_folder(tmp_path / "folder", sync) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
    assert done == ([str(temporary), str(folder / "sub" / "file")] if sync else [])


def test_a_link_gives_way_and_what_it_points_at_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "folder").symlink_to("elsewhere")
    (tmp_path / "file").symlink_to("elsewhere/mine")
    (tmp_path / ".file.partial").symlink_to("elsewhere/mine")  # is not written through
    with replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert not (tmp_path / "folder").is_symlink() and not (tmp_path / "file").is_symlink()
    assert content(tmp_path / "elsewhere") == [("mine", "mine")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "file", "folder"]


def test_what_was_removed_is_not_taken_for_what_stands(tmp_path):
    with replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("a")
    discard(tmp_path / "folder")
    assert standing(tmp_path / "folder") is None and list(tmp_path.iterdir()) == []
    (tmp_path / ".folder.old.partial").mkdir()  # of a removal that was killed
    assert standing(tmp_path / "folder") is None and replaced_in(tmp_path, "folder") == []


@given(st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1))
def test_leftovers_are_known_by_name_and_by_one_pattern(name):
    for path in leftovers_of(Path("run") / f"x{name}"):
        assert path.parent == Path("run") and is_leftover(path.name) == ("\n" not in name)
    assert not is_leftover(f"x{name}")


@pytest.mark.parametrize(
    "name", [".1.json.tmp", ".report.html.tmp", "..holder.json.tmp", ".pruned.old.partial"]
)
def test_earlier_names_are_still_known(name):
    assert is_leftover(name) and atomic.temporary_of(Path(name[1:])).name.endswith(".partial")
