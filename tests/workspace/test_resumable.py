"""Artifacts that take long: resumed, set aside, found again, whatever they are killed in the middle of."""

from pathlib import Path

import pytest

from nemo_minitron.workspace.artifacts import verify
from nemo_minitron.workspace.build import set_aside
from nemo_minitron.workspace.manifest import Input, read_manifest
from nemo_minitron.workspace.resumable import make_resumable


def test_a_resumable_build_finds_its_state_and_another_recipe_sets_it_aside(tmp_path, capsys):
    folder, seen = tmp_path / "student", []

    def build(fails):
        def inner(state, target):
            seen.append(sorted(path.name for path in state.iterdir()))
            (state / "step").write_text("5")
            (target / "hf").mkdir()
            (target / "hf" / "weights").write_text("w")
            if fails:
                raise KeyboardInterrupt

        return inner

    with pytest.raises(KeyboardInterrupt):
        make_resumable(folder, "student", {"lr": 1}, [], build(True))
    assert read_manifest(folder) is None
    assert make_resumable(folder, "student", {"lr": 1}, [], build(False))
    assert seen == [["recipe.json"], ["recipe.json", "step"]]
    assert not make_resumable(folder, "student", {"lr": 1}, [], build(False))
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "manifest.json"]
    assert verify(folder) == []
    with pytest.raises(KeyboardInterrupt):
        make_resumable(folder, "student", {"lr": 2}, [], build(True))
    assert seen[-1] == ["recipe.json"]
    assert not (folder / "hf").exists()
    (folder / "state" / "step").write_text("weeks")
    with pytest.raises(KeyboardInterrupt):
        make_resumable(
            folder, "student", {"lr": 3, "trainer": {"precision": "bf16"}}, [], build(True)
        )
    said = capsys.readouterr().err
    assert (
        "student: begun with other settings (lr: 2, now 3; trainer.precision: None, now bf16)"
        in said
    )
    (aside,) = set_aside(folder)
    assert (aside / "step").read_text() == "weeks" and str(aside) in said
    assert make_resumable(
        folder, "student", {"lr": 3, "trainer": {"precision": "bf16"}}, [], build(False)
    )
    assert aside.is_dir() and verify(folder) == []

    def look(state, target):
        seen.append((state / "step").read_text())
        (target / "weights").write_text("w")

    assert make_resumable(folder, "student", {"lr": 2}, [], look)  # those settings come back
    assert seen[-1] == "weeks" and not set_aside(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "weights"]


def trained(text):
    """Makes weights and a log of a text; fails where nothing may be made."""

    def build(state, target):
        assert text is not None, "nothing was to be trained"
        (state / "step").write_text(text)
        (target / "hf").mkdir()
        (target / "hf" / "weights").write_text(text)
        (target / "log").write_text(text)
        (target / "logs" / "wandb").mkdir(parents=True)
        (target / "logs" / "wandb" / "run").write_text(text)

    return build


def student(folder, rate, text, inputs=()):
    return make_resumable(folder, "student", {"lr": rate}, list(inputs), trained(text), keep=True)


def test_what_a_training_finished_outlives_other_settings_and_comes_back_with_its_own(
    tmp_path, capsys
):
    folder = tmp_path / "student"
    assert student(folder, 1, "one") and student(folder, 2, "two")
    (aside,) = set_aside(folder)
    assert (aside / "hf" / "weights").read_text() == "one" and verify(aside) == []
    said = capsys.readouterr().err
    assert f"student: made with other settings (lr: 1, now 2); that is kept in {aside}" in said
    assert verify(folder) == [] and (folder / "hf" / "weights").read_text() == "two"
    assert not student(folder, 2, None)
    before = (aside / "manifest.json").read_bytes()
    assert not student(folder, 1, None)
    assert (folder / "manifest.json").read_bytes() == before and verify(folder) == []
    (other,) = set_aside(folder)
    assert other != aside and (other / "log").read_text() == "two"
    assert not student(folder, 2, None) and verify(folder) == []
    made = student(
        folder, 2, "three", [Input("pruned", "abc", "2999-01-01")]
    )  # its input was rebuilt
    assert made and len(set_aside(folder)) == 2
    assert "student: made from other inputs; that is kept in" in capsys.readouterr().err


def test_logs_are_the_users_to_do_with_as_they_like(tmp_path):
    folder = tmp_path / "student"
    assert student(folder, 1, "one")
    assert {output.file for output in read_manifest(folder).outputs} == {"hf/weights", "log"}
    (folder / "logs" / "wandb" / "run").unlink()
    (folder / "logs" / "notes").write_text("of the user")
    assert verify(folder) == [] and not student(folder, 1, None)
    assert student(folder, 2, "two") and not student(folder, 1, None)
    assert (folder / "logs" / "notes").read_text() == "of the user"
    assert not (folder / "logs" / "wandb" / "run").exists()


@pytest.mark.parametrize("lr", [1, 2])
def test_a_finished_training_that_is_damaged_is_not_trained_over(tmp_path, lr):
    folder = tmp_path / "student"
    assert student(folder, 1, "one")
    (folder / "log").write_text("a line by hand")
    with pytest.raises(
        ValueError, match=r"student: a finished training, and log has 14 bytes, expected 3; put"
    ):
        student(folder, lr, "anew")
    (folder / "log").unlink()
    with pytest.raises(ValueError, match=r"and log is missing; put .* or remove the folder"):
        student(folder, lr, "anew")
    assert (folder / "hf" / "weights").read_text() == "one"


def test_a_training_whose_manifest_or_recipe_is_damaged_is_neither_moved_nor_removed(tmp_path):
    folder = tmp_path / "student"
    assert student(folder, 1, "one")
    (folder / "manifest.json").write_text("null")
    with pytest.raises(ValueError, match=r"student/manifest\.json: not a manifest .* distill"):
        student(folder, 1, "one")
    assert (folder / "hf" / "weights").read_text() == "one"
    (folder / "manifest.json").unlink()
    (folder / "state").mkdir()
    (folder / "state" / "weeks").write_text("of work")
    for text in ("null", "[]", '{"recipe": 1}', "{" * 5000, ""):
        (folder / "state" / "recipe.json").write_text(text)
        with pytest.raises(ValueError, match=r"state/recipe\.json: damaged: .* remove it"):
            student(folder, 1, "one")
        assert (folder / "state" / "weeks").read_text() == "of work"


def test_a_finished_one_that_was_damaged_aside_is_made_anew(tmp_path):
    folder = tmp_path / "student"
    assert student(folder, 1, "one") and student(folder, 2, "two")
    (aside,) = set_aside(folder)
    (aside / "log").unlink()
    assert student(folder, 1, "anew") and verify(folder) == []
    (other,) = set_aside(folder)
    assert (other / "log").read_text() == "two"


@pytest.mark.parametrize("back", [False, True])
def test_a_kill_while_things_are_moved_loses_nothing(tmp_path, monkeypatch, back):
    """A kill before any one of the moves, while it is set aside or comes back."""
    moves, whole, left = 0, False, []

    def killed(move):
        def inner(path, target):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return move(path, target)

        return inner

    while not whole:
        folder = tmp_path / str(moves) / "student"
        assert student(folder, 1, "one")
        assert student(folder, 2, "two")
        rates = (1, 2) if back else (3, 2)

        left[:] = [None] * moves
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed(Path.replace))
            patch.setattr(Path, "rename", killed(Path.rename))
            try:
                student(folder, rates[0], None if back else "three")
                whole = True
            except KeyboardInterrupt:
                pass
        for rate, text in ((2, "two"), (1, "one"), (2, "two")):
            assert not student(folder, rate, None), moves
            assert (folder / "hf" / "weights").read_text() == text and verify(folder) == []
            assert (folder / "logs" / "wandb" / "run").read_text() == text, moves
        moves += 1
    assert moves > 5
