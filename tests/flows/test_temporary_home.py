"""Prefect's folder where a user has no home: it goes with its process, whatever that dies of."""

import os
import subprocess
import sys
import tempfile

import pytest

from nemo_minitron.flows import local

MAKES = (
    "import sys\nfrom nemo_minitron.flows import local\nprint(local.temporary_home(), flush=True)\n"
)


def making(place, rest):
    return subprocess.Popen(
        [sys.executable, "-c", MAKES + rest], env={**os.environ, "TMPDIR": str(place)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_home_goes_with_its_process_and_the_next_start_removes_those_of_killed_ones(
    place,
):
    ended, killed, living = (making(place, "sys.stdin.read()") for _ in range(3))
    homes = [process.stdout.readline().strip() for process in (ended, killed, living)]
    ended.communicate()
    assert not os.path.exists(homes[0])
    killed.kill()
    killed.communicate()
    (place / "minitron-prefect-users").mkdir()  # without a lock: just made, perhaps
    (place / "minitron-prefect-old").mkdir()
    os.utime(place / "minitron-prefect-old", (0, 0))
    (place / "minitron-prefect-full").mkdir()
    (place / "minitron-prefect-full" / "file").write_text("not ours")
    os.utime(place / "minitron-prefect-full", (0, 0))
    (place / "minitron-prefect-link").symlink_to(place / "minitron-prefect-full")
    process = making(place, "sys.stdin.read()")
    mine = process.stdout.readline().strip()
    left = {str(path) for path in place.glob("minitron-prefect-*")}
    kept = {str(place / f"minitron-prefect-{name}") for name in ("users", "full", "link")}
    assert left == {homes[2], mine, *kept}
    for each in (living, process):
        each.communicate()
    assert {str(path) for path in place.glob("minitron-prefect-*")} == kept


def test_a_home_that_cannot_be_made_is_a_temporary_one(place, monkeypatch):
    (place / "file").write_text("")
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr(local.atexit, "register", lambda *_: None)
    local.prepare_environment()
    assert os.path.dirname(os.environ["PREFECT_HOME"]) == str(place)
    assert os.path.basename(os.environ["PREFECT_HOME"]).startswith("minitron-prefect-")
