"""The commands of those who operate, as they are typed."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from nemo_minitron.cli.main import main
from nemo_minitron.workspace.locks import locked


def called(capsys, *words):
    capsys.readouterr()
    code = main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def runs(finished, tmp_path):
    """A folder with a finished run and one whose student is missing."""
    shutil.copytree(finished[0], tmp_path / "runs" / "whole")
    shutil.copytree(finished[0], tmp_path / "runs" / "broken")
    (tmp_path / "runs" / "broken" / "student" / "hf" / "config.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "broken" / "export")
    return tmp_path / "runs"


def test_runs_are_listed_with_states_sizes_and_ages(runs, capsys):
    with locked(runs / "whole"):
        code, out, _ = called(capsys, "runs", str(runs))
    assert code == 0
    row = next(line for line in out.splitlines() if "whole" in line)
    assert "running" in row and "export" in row and "kB" in row
    broken = next(line for line in out.splitlines() if "broken" in line)
    assert "student damaged" in broken and "running" not in broken
    code, out, _ = called(capsys, "runs", str(runs), "--json")
    listed = {row["path"].rsplit("/", 1)[1]: row for row in json.loads(out)}
    assert [a["name"] for a in listed["whole"]["artifacts"] if a["state"] == "done"][-1] == "export"
    assert listed["whole"]["held"] is False and listed["whole"]["bytes"] > 100_000
    assert called(capsys, "runs", str(runs / "nowhere"))[0] == 2
    (runs.parent / "link").symlink_to(runs)
    code, out, _ = called(capsys, "runs", str(runs.parent / "link"))
    assert code == 0 and any("│ broken " in line for line in out.splitlines())


def test_clean_asks_first_and_removes_only_what_can_be_made_again(runs, capsys):
    workspace = runs / "whole"
    code, out, err = called(capsys, "clean", str(workspace))
    assert code == 2 and "nobody there to ask; pass --yes" in err and "tokens" in out
    caches = lambda: list((workspace / "tokens").glob("*/manifest.json"))  # noqa: E731
    assert caches()
    for answer, gone in (("n", False), ("y", True)):
        ours, theirs = pty.openpty()  # a terminal, where somebody answers
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_minitron", "clean", str(workspace)], stdin=theirs,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.write(ours, f"{answer}\n".encode())
        process.communicate(timeout=60)
        os.close(ours), os.close(theirs)
        assert process.returncode == (0 if gone else 1)
        assert bool(caches()) is not gone
    code, out, _ = called(capsys, "clean", str(workspace), "--intermediate", "--yes", "--json")
    assert code == 0 and json.loads(out)["freed"] > 10_000
    assert (
        not (workspace / "student").exists()
        and (workspace / "export" / "model.safetensors").is_file()
    )
    code, _, err = called(capsys, "clean", str(runs / "broken"), "--intermediate", "--yes")
    assert code == 2 and (runs / "broken" / "pruned").is_dir() and "export" in err
    with locked(workspace):
        assert called(capsys, "clean", str(workspace), "--yes")[0] == 2
    assert called(capsys, "clean", str(runs), "--yes")[0] == 2
