"""A distillation that is stopped early and goes on elsewhere is the one that was never stopped."""

import json

import torch

from nemo_minitron.cli.main import main
from tests.support.runs import prune, refused
from tests.support.two_ranks import curve, weights


def distil(place, *words):
    prune(place, *words)
    assert main(["distill", f"workspace={place}", *words]) == 0


def taken(place):
    """The log's lines of steps."""
    return [line for line in curve(place) if "val_loss" not in line]


def test_it_goes_on_as_if_it_had_never_been_stopped(tmp_path, words, capsys):
    straight, first, second, again, last = (
        tmp_path / name for name in ("straight", "first", "second", "again", "last")
    )
    distil(straight, *words)
    distil(first, *words, "distill.stop_after=1")
    distil(second, *words, "distill.stop_after=4", f"distill.go_on_from={first / 'student'}")
    stopped = json.loads((second / "student" / "stopped.json").read_text())
    assert stopped == {"step": 4, "reason": "distill.stop_after=4"}
    assert taken(second) == taken(straight)[:4]
    # as one that was killed behind its last checkpoint: there is no step left to take
    distil(again, *words, "distill.stop_after=4", f"distill.go_on_from={second / 'student'}")
    assert taken(again) == taken(second)
    assert all(torch.equal(weights(again)[n], t) for n, t in weights(second).items())
    capsys.readouterr()
    distil(last, *words, f"distill.go_on_from={second / 'student'}")
    assert "starts over" not in capsys.readouterr().err
    assert taken(last) == taken(straight)
    validated = [line for line in curve(straight) if "val_loss" in line]
    assert len(validated) == 2 and all(line in curve(last) for line in validated)
    # behind each stop, too: what was measured there came along, and its steps were not taken again
    assert [line["step"] for line in curve(last) if "val_loss" in line] == [1, 3, 4, 6]
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(last)[name], tensor), name
    manifests = [
        json.loads((p / "student" / "manifest.json").read_text()) for p in (straight, last)
    ]
    assert (
        manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    )  # where it came from decides nothing
    assert (
        not {"stop_after", "go_on_from"} & manifests[0]["config"].keys()
    )  # as before there were any
    assert main(["verify", str(second)]) == 0


def test_what_is_not_its_beginning_is_told_and_left(tmp_path, words, capsys):
    straight, first, other = tmp_path / "straight", tmp_path / "first", tmp_path / "other"
    distil(straight, *words, "optim.lr=0.01")
    distil(first, *words, "distill.stop_after=2")
    come = f"distill.go_on_from={first / 'student'}"
    for more, why in (
        (["optim.lr=0.01"], "distilled with other settings (optim)"),
        (["distill.stop_after=1"], "distilled for more steps (2) than this one (1)"),
    ):
        capsys.readouterr()
        distil(other, *words, *more, come)
        said = capsys.readouterr().err
        assert f"{why}; the distillation starts over" in said
        if not more[0].startswith("distill"):
            assert all(torch.equal(weights(other)[n], t) for n, t in weights(straight).items())
    capsys.readouterr()
    distil(other, *words, "plan.ffn=24", come)
    assert "distilled from other inputs; the distillation starts over" in capsys.readouterr().err
    distil(other, *words, f"distill.go_on_from={straight / 'student'}")
    assert "no distillation that was stopped early" in capsys.readouterr().err
    said = refused(capsys, "distill", f"workspace={other}", *words, "distill.stop_after=6")
    assert "distill.stop_after: expected fewer steps than the training's 6, found 6" in said


def test_what_looks_back_on_all_validations_is_refused_of_a_part(tmp_path, words, capsys):
    """Before anything is trained, and wherever the beginning comes from."""
    first, place = tmp_path / "first", tmp_path / "parts"
    distil(first, *words, "distill.stop_after=2")
    prune(place, *words)
    stopping = "exp_manager.create_early_stopping_callback"
    for part in (f"distill.go_on_from={first / 'student'}", "distill.stop_after=4"):
        for key, instead in (
            ("training.keep=best:loss", "training.keep=last"),
            (f"{stopping}=true", f"{stopping}=false"),
        ):
            capsys.readouterr()
            asked = key if key.startswith("training") else f"+{key}"
            said = refused(capsys, "distill", f"workspace={place}", *words, part, asked)
            assert f"{part.partition('=')[0]}: not with {key}, which looks back" in said
            assert f"use {instead}, or train in one piece" in said
    assert not (place / "student").exists()
    # each of them alone is a training, and so is what does without
    distil(place, *words, f"distill.go_on_from={first / 'student'}", f"+{stopping}=false")
    distil(tmp_path / "whole", *words, "training.keep=best:loss")
