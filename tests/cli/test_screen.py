"""A terminal shows names from outside, and does not obey them."""

import shutil

import pytest

from nemo_minitron.cli.main import main
from nemo_minitron.workspace.manifest import write_manifest

NAMES = ["a[b]c[red]", "[bold]x", "[link=host]x", "red\x1b[31m\x1b]0;title\x07", "turned\u202egnp"]


@pytest.mark.parametrize("name", NAMES)
def test_commands_show_any_folders_name_whole(model_folder, tmp_path, capsys, name):
    folder = model_folder(name=name)
    workspace = tmp_path / "runs" / name
    (workspace / "plan").mkdir(parents=True)
    (workspace / "plan" / name).write_text("")
    write_manifest(workspace / "plan", "plan", {}, [], "2026")
    assert main(["size", str(folder)]) == 0
    assert main(["runs", str(tmp_path / "runs")]) == 0
    (workspace / "plan" / name).write_text("other")
    assert main(["verify", str(workspace)]) == 1
    assert main(["size", str(tmp_path / f"absent{name}")]) == 2
    assert main(["size", f"{folder}[/b]"]) == 2  # closes what rich has not opened
    assert main(["families", name]) == 2
    shutil.rmtree(workspace)
    said = "".join(capsys.readouterr())
    assert not any(ord(c) < 32 and c != "\n" for c in said)
    assert "\u202e" not in said
    shown = name.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e")
    squeezed = "".join(said.split())  # a table wraps long names
    assert squeezed.count("".join(shown.split())) >= 5


def test_a_message_is_no_longer_than_can_be_read(capsys):
    assert main(["size", "x" * 100_000]) == 2
    assert len(capsys.readouterr().err) < 5000
