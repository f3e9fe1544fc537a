"""One answer to whether an artifact is still good, and all who put it into words agree with it."""

import dataclasses
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_minitron.workspace import condition as rule
from nemo_minitron.workspace.artifacts import input_artifact, verify
from nemo_minitron.workspace.build import make
from nemo_minitron.workspace.condition import Why, condition, damage, in_words
from nemo_minitron.workspace.inventory import workspaces
from nemo_minitron.workspace.manifest import Input, fingerprint, read_manifest
from tests.support.fuzzing import examples

MADE_FROM = {
    "teacher": (),
    "scores": ("teacher",),
    "plan": ("teacher", "scores"),
    "pruned": ("teacher", "plan"),
}


def fill(folder):
    (folder / "a").write_text("a" * 10)
    (folder / "b").write_text("b" * 10)


def inputs_of(workspace, name):
    return [input_artifact(workspace, upstream, upstream) for upstream in MADE_FROM[name]]


def run(workspace, **config):
    for name in MADE_FROM:
        make(workspace / name, name, config.get(name, {}), inputs_of(workspace, name), fill)


def rewritten(folder, **values):
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, **values}))


def linked(at):
    (at / "plan" / "a").unlink()
    (at / "plan" / "a").symlink_to(at / "scores" / "a")


def anew(at, name, config):
    shutil.rmtree(at / name)
    make(at / name, name, config, inputs_of(at, name), fill)


HARMS = [
    (lambda at: None, "done", None, ""),
    (lambda at: shutil.rmtree(at / "plan"), "absent", None, ""),
    (lambda at: (at / "plan" / "manifest.json").unlink(), "absent", None, ""),
    (
        lambda at: (at / "plan" / "manifest.json").write_text("{"),
        "damaged",
        "unreadable",
        "not a manifest",
    ),
    (lambda at: (at / "plan" / "b").unlink(), "damaged", "missing", "missing"),
    (
        lambda at: (at / "plan" / "b").write_text("b"),
        "damaged",
        "size",
        "expected 10 bytes, found 1",
    ),
    (linked, "damaged", "outside", "lies outside of the folder, at "),
    (lambda at: rewritten(at / "plan", schema=0), "stale", "schema", "made by schema 0, now 1"),
    (lambda at: anew(at, "scores", {"n": 1}), "stale", "another", "made from another scores"),
    (lambda at: anew(at, "scores", {}), "stale", "rebuilt", "scores was rebuilt"),
    (lambda at: shutil.rmtree(at / "scores"), "done", None, ""),
    (
        lambda at: (at / "scores" / "manifest.json").write_text("{"),
        "done",
        "unknown",
        "not a manifest",
    ),
]


@pytest.mark.parametrize(("harm", "state", "fault", "words"), HARMS)
def test_the_first_thing_that_is_wrong_is_named_and_everybody_says_the_same(
    tmp_path, harm, state, fault, words
):
    run(tmp_path)
    harm(tmp_path)
    found = condition(tmp_path / "plan")
    assert (found.state, found.why and found.why.fault) == (state, fault)
    assert (found.manifest is None) == (state == "absent" or fault == "unreadable")
    if found.why is not None:
        assert words in in_words(found.why)
    (listed,) = workspaces(tmp_path)
    listed = {artifact.name: artifact for artifact in listed.artifacts}
    if state == "absent":
        assert "plan" not in listed
    else:
        assert listed["plan"].state == state and (
            words in listed["plan"].detail or fault == "unknown"
        )
    if (state == "done" and fault is None) or fault == "rebuilt":
        assert input_artifact(tmp_path, "plan", "plan").fingerprint == found.manifest.fingerprint
    else:
        with pytest.raises(ValueError, match=r"plan|not a manifest"):
            input_artifact(tmp_path, "plan", "plan")
    if state == "damaged" and found.manifest is not None:
        assert found.why.name in damage(tmp_path / "plan", found.manifest)
        assert [line for line in verify(tmp_path / "plan") if found.why.name in line]


def test_another_input_is_told_before_a_newer_one(tmp_path):
    run(tmp_path)
    anew(tmp_path, "teacher", {})
    assert condition(tmp_path / "plan").why == Why("rebuilt", "teacher")
    shutil.rmtree(tmp_path / "scores")
    make(tmp_path / "scores", "scores", {"n": 1}, inputs_of(tmp_path, "scores"), fill)
    assert condition(tmp_path / "plan").why == Why("another", "scores")
    (tmp_path / "plan" / "a").unlink()  # and damage before both
    assert condition(tmp_path / "plan").why == Why("missing", "a")


def test_what_is_asked_for_decides(tmp_path):
    run(tmp_path)
    folder, inputs = tmp_path / "plan", inputs_of(tmp_path, "plan")
    expected = fingerprint("plan", {}, inputs)
    assert condition(folder, expected, inputs).state == "done"
    assert condition(folder, "x", inputs).why == Why("recipe", "", "x", expected)
    newer = [inputs[0], dataclasses.replace(inputs[1], finished="9999")]
    assert condition(folder, expected, newer).why == Why("rebuilt", "scores")
    anew(
        tmp_path, "teacher", {"n": 1}
    )  # what lies there does not count where it is said what is asked for
    assert condition(folder, expected, inputs).state == "done"


AHEAD = "2099-01-01T00:00:00+00:00"


def test_a_clock_that_was_ahead_once_makes_nothing_anew_for_ever(tmp_path):
    run(tmp_path)
    rewritten(tmp_path / "plan", finished=AHEAD)
    (item,) = (item for item in inputs_of(tmp_path, "pruned") if item.path == "plan")
    assert item.finished == AHEAD
    folder = tmp_path / "pruned"
    inputs = inputs_of(tmp_path, "pruned")
    assert make(folder, "pruned", {}, inputs, fill)  # it was made from an older plan
    for _ in range(2):
        assert not make(folder, "pruned", {}, inputs_of(tmp_path, "pruned"), fill)
        assert condition(folder).state == "done"
        assert input_artifact(tmp_path, "pruned", "prune").finished < AHEAD


def test_an_input_that_was_made_anew_while_the_clock_was_behind_is_seen(tmp_path):
    run(tmp_path)
    rewritten(tmp_path / "plan", finished="2001-01-01T00:00:00+00:00")
    assert condition(tmp_path / "pruned").why == Why("rebuilt", "plan")
    assert make(tmp_path / "pruned", "pruned", {}, inputs_of(tmp_path, "pruned"), fill)
    assert condition(tmp_path / "pruned").state == "done"


def test_a_manifest_whose_recipe_was_changed_by_hand_is_damaged(tmp_path):
    run(tmp_path)
    rewritten(tmp_path / "plan", config={"n": 2})
    assert condition(tmp_path / "plan").why.fault == "unreadable"
    with pytest.raises(ValueError, match=r"plan/manifest\.json: its fingerprint is not that of"):
        input_artifact(tmp_path, "plan", "plan")


def test_a_small_file_that_was_changed_in_its_size_is_no_input(tmp_path):
    run(tmp_path)
    (tmp_path / "plan" / "b").write_text("c" * 10)
    assert condition(tmp_path / "plan").state == "done"  # at a glance
    with pytest.raises(ValueError, match=r"plan/b: not the file that was made .* 'minitron plan'"):
        input_artifact(tmp_path, "plan", "plan")


def test_an_artifact_has_to_be_made_from_what_it_tells_of(tmp_path):
    run(tmp_path)
    teacher, scores = inputs_of(tmp_path, "plan")
    assert condition(tmp_path / "plan", inputs=[teacher]).state == "done"
    for item, fault in [
        (Input("student", scores.fingerprint, scores.finished), "another"),  # not among its inputs
        (dataclasses.replace(scores, fingerprint="x"), "another"),
        (
            dataclasses.replace(scores, finished="2020"),
            "rebuilt",
        ),  # the same recipe, at another time
    ]:
        assert condition(tmp_path / "plan", inputs=[item]).why == Why(fault, item.path)


def test_a_model_inside_of_an_artifact_counts_by_its_time_and_an_outsider_of_its_name_does_not(
    tmp_path,
):
    make(tmp_path / "pretrain", "pretrain", {}, [], fill)
    item = Input("pretrain/hf", "a checkpoint's", read_manifest(tmp_path / "pretrain").finished)
    make(tmp_path / "teacher", "teacher", {}, [item, Input("plan", "the user's own")], fill)
    make(tmp_path / "plan", "plan", {"another": 1}, [], fill)
    assert condition(tmp_path / "teacher").state == "done"
    (tmp_path / "pretrain" / "manifest.json").write_text("{")
    assert condition(tmp_path / "teacher") == condition(tmp_path / "teacher", inputs=[item])
    anew_at = tmp_path / "pretrain"
    shutil.rmtree(anew_at)
    make(anew_at, "pretrain", {"seed": 1}, [], fill)
    assert condition(tmp_path / "teacher").why == Why("rebuilt", "pretrain")


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    max_examples=examples(40),
)
@given(
    st.lists(st.sampled_from(["teacher", "scores", "plan", "pruned"]), max_size=4, unique=True),
    st.data(),
)
def test_done_is_what_a_run_would_leave_alone(tmp_path_factory, harmed, data):
    """After any damage and rebuilding, a run makes exactly what does not count as done, and what follows from it."""
    at = tmp_path_factory.mktemp("run")
    run(at)
    for name in harmed:
        if data.draw(st.booleans()):
            (at / name / "a").write_text("short")
        else:
            shutil.rmtree(at / name)
    due = [name for name in MADE_FROM if condition(at / name).state != "done"]
    assert sorted(set(harmed)) == sorted(due)
    made = [name for name in MADE_FROM
            if make(at / name, name, {}, inputs_of(at, name), fill)]  # fmt: skip
    follow = set(due)
    for name, upstream in MADE_FROM.items():
        follow |= {name} if follow & set(upstream) else set()
    assert set(made) == follow
    assert all(condition(at / name).state == "done" for name in MADE_FROM)


def test_every_fault_has_words():
    assert set(rule._WORDS) == set(rule.Fault.__args__)
