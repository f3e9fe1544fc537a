"""No text of a model, a card or a workspace is ever run: an export is tried by a constant."""

import json
import re
import shutil

import pytest

from nemo_minitron.release.quickstart import QUICKSTART
from nemo_minitron.workspace.manifest import NAME, hash_file
from tests.support.runs import minitron, settings


def written(workspace, name, change):
    """Changes a file of an artifact, and has the manifest agree with it, as whoever gives it away would."""
    path = workspace / name
    change(path)
    manifest = path.parent / NAME
    found = json.loads(manifest.read_text())
    for output in found["outputs"]:
        if output["file"] == path.name:
            output |= {"size": path.stat().st_size, "sha256": hash_file(path)}
    manifest.write_text(json.dumps(found))


def entry(key, value):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


@pytest.fixture
def given_away(finished, tmp_path, teacher, corpus):
    """A finished run that somebody else has passed on, without its export; and what exports it."""
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workspace / "export")
    source = shutil.copytree(teacher, tmp_path / "source")
    written(workspace, "teacher/source.json", entry("path", str(source)))

    def export(*more):
        # the recorded source stays what it is: its model was scored and pruned
        done = minitron(
            "export", f"workspace={workspace}", *settings(workspace, teacher, corpus)[2:], *more
        )
        assert "Traceback" not in done.stderr
        return done

    return workspace, source, export


def fences(card):
    return re.findall(r"^ {0,3}```.*?$", card, re.MULTILINE)


def test_a_models_card_runs_nothing_when_its_student_is_exported(given_away, tmp_path):
    workspace, source, export = given_away
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: x ```python\n"
        f'license_link: open("{tmp_path}/PWNED","w")```\n---\n# A model\n```python\nopen("{tmp_path}/PWNED2","w")\n```\n'
    )
    done = export()
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.glob("PWNED*"))
    card = (workspace / "export" / "README.md").read_text()
    assert f"```python\n{QUICKSTART}\n```" in card
    assert fences(card) == ["```python", "```"]
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "PWNED" not in front and "license: other" in front
    assert "The source's card states its licence" in body
    # an innocent card with code of its own hinders nothing either
    (source / "README.md").write_text("---\nlicense: mit\n---\n```python\n   indented(\n```\n")
    shutil.rmtree(workspace / "export")
    assert export().returncode == 0


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("teacher/source.json", "given"),
        pytest.param("teacher/source.json", "revision", marks=pytest.mark.slow),
        pytest.param("plan/plan.json", "model_type", marks=pytest.mark.slow),
    ],
)
def test_a_workspace_of_somebody_elses_runs_nothing(given_away, tmp_path, file, key):
    workspace, _, export = given_away
    code = f"x`\n```python\nopen('{tmp_path}/PWNED','w')\n"
    written(workspace, file, entry(key, code))
    done = export("export.name='[a](javascript:b)<script>'")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "PWNED").exists()
    card = (workspace / "export" / "README.md").read_text()
    assert fences(card) == ["```python", "```"]
    assert "<script>" not in card.split("\n---\n", 1)[1]


def test_a_link_in_a_workspace_takes_no_file_of_the_users_along(given_away, tmp_path):
    workspace, _, export = given_away
    (tmp_path / "secret").write_text("of the user's")
    (workspace / "student" / "hf" / "LICENSE").symlink_to(tmp_path / "secret")
    done = export()
    assert done.returncode == 2
    assert "LICENSE: a link to" in done.stderr
    assert not (workspace / "export").exists()
