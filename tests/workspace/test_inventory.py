"""Workspaces as they are found, and what can go of them: on artifacts that were really made, held and killed."""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nemo_minitron.data.token_cache import cached_tokens
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.workspace.artifacts import ARTIFACTS, input_artifact, verify
from nemo_minitron.workspace.build import make, set_aside
from nemo_minitron.workspace.command_log import COMMANDS, note_command
from nemo_minitron.workspace.inventory import (
    KEPT,
    LOCKS,
    Item,
    is_workspace,
    remove,
    rubbish,
    workspaces,
)
from nemo_minitron.workspace.locks import TRACES, locked
from nemo_minitron.workspace.manifest import Input, read_manifest
from nemo_minitron.workspace.resumable import make_resumable
from tests.support.text_samples import found

PIPELINE = {
    "teacher": (), "scores": ("teacher",), "plan": ("teacher", "scores"), "pruned": ("teacher", "plan"),
    "logits": ("teacher",), "student": ("pruned", "logits"), "report": ("student",), "export": ("student", "report"),
}  # fmt: skip
TRAINED = ("scores", "logits", "student")
ORDER = sorted(PIPELINE, key=ARTIFACTS.index)


def fill(folder):
    (folder / "hf").mkdir()
    (folder / "hf" / "weights").write_bytes(b"w" * 1000)
    (folder / "notes.txt").write_text("x" * 10)


def run(workspace, names=tuple(PIPELINE)):
    """Brings a workspace up to date as a run does; returns what had to be made."""
    made = []
    for name in names:
        inputs = [input_artifact(workspace, upstream, upstream) for upstream in PIPELINE[name]]
        if name in TRAINED:
            due = make_resumable(
                workspace / name, name, {}, inputs, lambda state, target: fill(target)
            )
        else:
            due = make(workspace / name, name, {}, inputs, fill)
        made += [name] if due else []
    return made


def states(workspace):
    (only,) = workspaces(workspace)
    return {artifact.name: artifact.state for artifact in only.artifacts}


def detail(workspace, name):
    (only,) = workspaces(workspace)
    return next(artifact.detail for artifact in only.artifacts if artifact.name == name)


def start(code, *arguments):
    """Starts a Python process, and waits until it says that it is there."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    return process


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def names_of(items, workspace):
    return [str(item.path.relative_to(workspace)) for item in items]


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def weight(folder):
    """Bytes of a folder, counted by other means."""
    told = {
        (s.st_dev, s.st_ino): s.st_size
        for s in (p.lstat() for p in folder.rglob("*") if p.is_file())
    }
    return sum(told.values())


HOLDING = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("there", flush=True)
time.sleep(60)
"""
TRAINING = """
import json, sys, time
from pathlib import Path
from nemo_minitron.workspace.resumable import make_resumable
def build(state, target):
    lines = [{"step": 100}, {"step": 120, "val_loss": 2.0}]
    (state / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines) + '{"step": 1')
    (target / "half").write_bytes(b"h" * 500)
    print("there", flush=True)
    time.sleep(60)
make_resumable(Path(sys.argv[1]), "student", {"lr": 1}, [], build)
"""
BUILDING = """
import sys, time
from pathlib import Path
from nemo_minitron.workspace.build import make
def build(folder):
    (folder / "half").write_bytes(b"h" * 300)
    print("there", flush=True)
    time.sleep(60)
make(Path(sys.argv[1]), "any", {"other": 1}, [], build)
"""


def test_workspaces_are_found_three_levels_down_and_not_inside_of_others(tmp_path):
    root = tmp_path / "runs"
    for where in ("a", "b/c", "b/d/e"):
        run(root / where, ["teacher"])
    run(root / "b" / "d" / "e" / "deeper", ["teacher"])
    run(
        root / "a" / "student" / "hf", ["teacher"]
    )  # whatever lies in an artifact's folder is the artifact's
    run(root / "a" / "again", ["teacher"])
    run(root / ".hidden", ["teacher"])
    (root / "commanded").mkdir()
    note_command(root / "commanded", ["minitron", "plan"])
    (root / "empty" / "student").mkdir(parents=True)
    (root / "link").symlink_to(root / "b", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    seen = [str(one.path.relative_to(root)) for one in workspaces(root)]
    assert seen == ["a", "a/again", "b/c", "b/d/e", "commanded"]
    assert [one.path for one in workspaces(root / "b" / "d" / "e")] == [
        root / "b/d/e", root / "b/d/e/deeper"
    ]  # fmt: skip
    assert [one.path for one in workspaces(root / "link")] == [
        root / "b/c",
        root / "b/d/e",
        root / "b/d/e/deeper",
    ]
    assert workspaces(tmp_path / "nothing") == []


def test_a_workspace_says_how_large_it_is_when_it_changed_and_what_is_there(tmp_path):
    before = datetime.datetime.now(datetime.timezone.utc)
    assert run(tmp_path) == list(PIPELINE)
    outside = tmp_path.parent / "outside"
    outside.write_bytes(b"o" * 10**6)
    (tmp_path / "far").symlink_to(outside)
    os.link(tmp_path / "student" / "hf" / "weights", tmp_path / "second name")
    (only,) = workspaces(tmp_path)
    sizes = [(tmp_path / name / "manifest.json").stat().st_size + 1010 for name in ORDER]
    assert [(a.name, a.state, a.bytes) for a in only.artifacts] == [
        (name, "done", size) for name, size in zip(ORDER, sizes, strict=True)
    ]
    assert only.bytes == sum(sizes) and not only.held
    assert only.artifacts[0].finished.isoformat() == read_manifest(tmp_path / ORDER[0]).finished
    assert before < only.artifacts[0].finished <= only.artifacts[-1].finished
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    os.utime(tmp_path / "plan" / "notes.txt", (1.5e9, 1.5e9))
    (only,) = workspaces(tmp_path)
    assert only.changed == datetime.datetime.fromtimestamp(1.5e9, datetime.timezone.utc)


def test_looking_at_a_lock_neither_makes_nor_keeps_nor_dates_one(tmp_path):
    run(tmp_path, ["teacher"])
    (only,) = workspaces(tmp_path)
    assert not only.held and not (tmp_path / ".lock").exists()
    for name in LOCKS:
        process = start(HOLDING, tmp_path / name)
        assert workspaces(tmp_path)[0].held
        kill(process)
        (later,) = workspaces(tmp_path)
        assert not later.held and later.changed == only.changed
    with locked(tmp_path):  # a look at it lets go again
        assert workspaces(tmp_path)[0].held


def test_an_input_that_was_made_anew_or_is_another_makes_stale(tmp_path):
    run(tmp_path)
    (tmp_path / "plan" / "notes.txt").unlink()
    assert run(tmp_path, ["plan"]) == ["plan"]
    assert states(tmp_path) == {name: "stale" if name == "pruned" else "done" for name in ORDER}
    assert detail(tmp_path, "pruned") == "plan was rebuilt"
    assert run(tmp_path) == ["pruned", "student", "report", "export"]  # so it was stale indeed
    assert set(states(tmp_path).values()) == {"done"}
    inputs = [input_artifact(tmp_path, "teacher", "download")]
    make(tmp_path / "plan", "plan", {"ffn": 8}, inputs, fill)
    assert detail(tmp_path, "pruned") == "made from another plan"
    with pytest.raises(ValueError, match="made from another plan"):
        input_artifact(tmp_path, "pruned", "prune")


def test_a_teacher_that_was_pretrained_here_counts_and_one_that_only_has_an_artifacts_name_does_not(
    tmp_path,
):
    make(tmp_path / "pretrain", "pretrain", {}, [], fill)
    item = Input("pretrain/hf", "a checkpoint's", read_manifest(tmp_path / "pretrain").finished)
    make(tmp_path / "teacher", "teacher", {}, [item, Input("plan", "the user's own folder")], fill)
    run(tmp_path, ["scores", "plan"])
    assert set(states(tmp_path).values()) == {"done"}
    make(tmp_path / "pretrain", "pretrain", {"seed": 1}, [], fill)
    assert (
        states(tmp_path)["teacher"] == "stale"
        and detail(tmp_path, "teacher") == "pretrain was rebuilt"
    )


def test_damage_is_seen_and_named(tmp_path):
    run(tmp_path)
    (tmp_path / "plan" / "notes.txt").unlink()
    (tmp_path / "student" / "hf" / "weights").write_bytes(b"short")
    (tmp_path / "logits" / "manifest.json").write_text("{")
    (tmp_path / "report" / "manifest.json").write_bytes(b"\xff\xfe")
    raw = json.loads((tmp_path / "pruned" / "manifest.json").read_text())
    (tmp_path / "pruned" / "manifest.json").write_text(
        json.dumps({**raw, "started": 5, "finished": 7})
    )
    raw["outputs"][0]["file"] = 3
    (tmp_path / "scores" / "manifest.json").write_text(json.dumps(raw))
    (tmp_path / "teacher" / "manifest.json").write_text('["inputs"]')
    damaged = [name for name, state in states(tmp_path).items() if state == "damaged"]
    assert damaged == [name for name in ORDER if name != "export"]
    assert detail(tmp_path, "plan") == "notes.txt: missing"
    assert detail(tmp_path, "student") == "hf/weights: expected 1000 bytes, found 5"
    assert "not a manifest" in detail(tmp_path, "logits")


def test_what_a_killed_process_leaves_is_unfinished_and_says_its_last_step(tmp_path):
    kill(start(TRAINING, tmp_path / "student"))
    kill(start(BUILDING, tmp_path / "report"))
    (only,) = workspaces(tmp_path)
    first, second = only.artifacts
    assert (first.name, first.state, first.finished, first.detail) == (
        "student",
        "unfinished",
        None,
        "logged up to step 120",
    )
    assert first.bytes == weight(tmp_path / "student") > 500
    assert (second.name, second.state, second.bytes, second.detail) == (
        "report",
        "unfinished",
        300,
        "",
    )
    for text in ("", "[]\n", '{"loss": 1}\n', '{"step": "x"}\n', "no log\n"):
        (tmp_path / "student" / "state" / "metrics.jsonl").write_text(text)
        assert detail(tmp_path, "student") == ""


CHURNING = """
import sys
from pathlib import Path
from nemo_minitron.workspace.build import discard, make
def build(folder):
    for number in range(20):
        (folder / str(number)).mkdir()
        (folder / str(number) / "file").write_text("x")
print("there", flush=True)
while True:
    make(Path(sys.argv[1]) / "plan", "plan", {}, [], build)
    discard(Path(sys.argv[1]) / "plan")
"""


def test_a_workspace_where_another_process_makes_and_removes_can_be_looked_at(tmp_path):
    run(tmp_path, ["teacher"])
    process = start(CHURNING, tmp_path)
    seen, end = set(), time.monotonic() + 10
    while time.monotonic() < end and len(seen) < 2:
        seen.add(states(tmp_path).get("plan"))
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert states(tmp_path)["teacher"] == "done"
    assert process.poll() is None and len(seen) >= 2  # it worked all the while
    kill(process)


def test_caches_and_leftovers_go_and_nothing_has_to_be_made_again(
    tmp_path, tokenizer_folder, corpus
):
    run(tmp_path)
    tokenizer, texts = load_tokenizer(tokenizer_folder, 300), found([corpus])
    ids = cached_tokens(tmp_path / "tokens", texts, tokenizer, 0, 500).tolist()
    (cache,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    before = everything(tmp_path)
    kill(start(BUILDING, tmp_path / "pruned"))
    kill(start(BUILDING, tmp_path / "results" / "tasks-1"))
    (tmp_path / "results" / ".1.json.tmp").write_text("1")
    (tmp_path / "report" / ".report.html.tmp").write_text("22")
    (tmp_path / "..holder.json.tmp").write_text("333")
    (tmp_path / "student" / "state" / "nemo").mkdir(
        parents=True
    )  # killed between manifest and tidying
    (tmp_path / "student" / "state" / "nemo" / "last.ckpt").write_bytes(b"c" * 700)
    (tmp_path / "tokens" / "notes").mkdir()
    (tmp_path / "mine.txt").write_text("of the user")
    items = rubbish(tmp_path)
    assert sorted(names_of(items, tmp_path)) == sorted([
        ".pruned.partial", "..holder.json.tmp", "results/.tasks-1.partial", "results/.1.json.tmp",
        "report/.report.html.tmp", "student/state", f"tokens/{cache.name}",
    ])  # fmt: skip
    total = weight(tmp_path)
    assert remove(items) == sum(item.bytes for item in items) == total - weight(tmp_path)
    kept = set(before) - {name for name in before if name.startswith(f"tokens/{cache.name}")}
    assert set(everything(tmp_path)) == kept | {"results", "tokens/notes", "mine.txt"}
    assert rubbish(tmp_path) == []
    assert run(tmp_path) == []
    assert all(verify(tmp_path / name) == [] for name in PIPELINE)
    assert cached_tokens(tmp_path / "tokens", texts, tokenizer, 0, 500).tolist() == ids


def test_what_a_killed_training_goes_on_from_stays(tmp_path):
    run(tmp_path, ["teacher"])
    kill(start(TRAINING, tmp_path / "student"))
    items = rubbish(tmp_path)
    assert [
        (name, item.bytes) for name, item in zip(names_of(items, tmp_path), items, strict=True)
    ] == [("student/.result.partial", 500)]
    remove(items)
    found = []

    def build(state, target):
        found.extend(sorted(path.name for path in state.iterdir()))
        fill(target)

    assert make_resumable(tmp_path / "student", "student", {"lr": 1}, [], build)
    assert found == ["metrics.jsonl", "recipe.json"]


def test_what_other_settings_finished_stays_and_what_they_began_goes(tmp_path):
    run(tmp_path, ["teacher"])

    def train(rate, text):
        def build(state, target):
            (state / "step").write_text("5")
            if text is None:
                raise KeyboardInterrupt
            fill(target)

        with contextlib.suppress(KeyboardInterrupt):
            make_resumable(tmp_path / "student", "student", {"lr": rate}, [], build, keep=True)

    for rate, text in ((1, "done"), (2, None), (3, None)):
        train(rate, text)
    items = rubbish(tmp_path)
    assert [item.why for item in items] == ["begun with other settings"]
    remove(items)
    (aside,) = set_aside(tmp_path / "student")
    assert (aside / "hf" / "weights").is_file() and rubbish(tmp_path) == []
    train(3, "done")
    assert verify(tmp_path / "student") == [] and states(tmp_path)["student"] == "done"
    train(1, None)  # nothing is trained
    assert read_manifest(tmp_path / "student").config == {"lr": 1}


def test_what_a_damaged_training_can_be_mended_from_stays(tmp_path):
    run(tmp_path)
    (tmp_path / "student" / "state").mkdir()
    (tmp_path / "student" / "state" / "last.ckpt").write_text("c")
    assert names_of(rubbish(tmp_path), tmp_path) == ["student/state"]
    (tmp_path / "student" / "hf" / "weights").unlink()
    assert rubbish(tmp_path) == []


def test_a_file_that_an_artifact_lists_stays_whatever_its_name(tmp_path):
    def build(folder):
        (folder / ".odd.partial").mkdir()
        (folder / ".odd.partial" / "file").write_text("x")
        (folder / ".odd.tmp").write_text("x")

    make(tmp_path / "export", "export", {}, [], build)
    make(tmp_path / "report", "report", {}, [], build)
    (tmp_path / "report" / "manifest.json").write_text(
        "{"
    )  # nothing says any more what belongs to it
    assert rubbish(tmp_path) == []


def test_of_token_caches_that_lie_elsewhere_only_the_link_goes(tmp_path):
    elsewhere, workspace = tmp_path / "shared", tmp_path / "run"
    for name in ("one", "two"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "tokens.bin").write_bytes(b"t" * 400)
    run(workspace, ["teacher"])
    (workspace / "tokens").symlink_to(elsewhere, target_is_directory=True)
    (item,) = rubbish(workspace)
    assert (item.path, item.bytes) == (workspace / "tokens", 0)
    assert remove([item]) == 0 and not os.path.lexists(workspace / "tokens")
    (workspace / "tokens").mkdir()
    (workspace / "tokens" / "one").symlink_to(elsewhere / "one", target_is_directory=True)
    (item,) = rubbish(workspace)
    assert (item.path, item.bytes) == (workspace / "tokens" / "one", 0)
    assert remove([item]) == 0
    assert everything(workspace / "tokens") == [] and weight(elsewhere) == 800
    (elsewhere / ".1.json.tmp").write_text("")
    (workspace / "results").symlink_to(elsewhere, target_is_directory=True)
    assert rubbish(workspace) == []


def test_a_token_cache_that_is_being_written_stays(tmp_path):
    run(tmp_path, ["teacher"])
    for name in ("one", "two"):
        (tmp_path / "tokens" / name).mkdir(parents=True)
        (tmp_path / "tokens" / name / "tokens.bin").write_bytes(b"t" * 400)
    process = start(HOLDING, tmp_path / "tokens" / ".one.lock")
    assert names_of(rubbish(tmp_path), tmp_path) == ["tokens/two"]
    kill(process)
    assert names_of(rubbish(tmp_path), tmp_path) == ["tokens/one", "tokens/two"]


def test_behind_a_whole_export_only_what_a_run_is_for_stays(tmp_path):
    run(tmp_path)
    note_command(tmp_path, ["minitron", "run"])
    for name in (
        "tokens/1/tokens.bin",
        "live/step=4/config.json",
        "unpacked/1/hf/model",
        "unpacked/own/notes",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"b" * 50)
    for name in (
        "results/1.json",
        "scratch/own.txt",
        "data/text.txt",
    ):  # scratch/: the user's, by its contents
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("kept")
    kill(start(BUILDING, tmp_path / "pruned"))
    (tmp_path / "student" / ".weights.tmp").write_text("goes with its folder")
    items = rubbish(tmp_path, "intermediate")
    assert names_of(items, tmp_path) == [
        ".pruned.partial", "tokens/1", "student", "logits", "pruned", "scores", "teacher", "live/step=4", "unpacked/1",
    ]  # fmt: skip
    total = weight(tmp_path)
    assert remove(items) == sum(item.bytes for item in items) == total - weight(tmp_path) > 5000
    left = {
        name.split("/")[0]
        for name in everything(tmp_path)
        if not name.startswith(("live", "tokens"))
    }
    assert left == {*KEPT, COMMANDS, "results", "scratch", "data", "unpacked"}
    assert states(tmp_path) == dict.fromkeys(KEPT, "done")
    assert all(verify(tmp_path / name) == [] for name in KEPT)
    assert rubbish(tmp_path, "intermediate") == []


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda at: remove([Item(at / "export", 0, "")]), "found none"),
        (
            lambda at: (at / "export" / "hf" / "weights").unlink(),
            "found it damaged: hf/weights: missing",
        ),
        (lambda at: (at / "export" / "manifest.json").write_text("{"), "found it damaged"),
        (
            lambda at: make(at / "report", "report", {"more": 1}, [], fill),
            "found it stale: made from another report",
        ),
        (lambda at: (at / "export" / "manifest.json").unlink(), "found none"),
        (lambda at: make(at / "correct", "correct", {}, [], fill), "found .*correct to be younger"),
        (lambda at: kill(start(TRAINING, at / "student")), "found .*student to be younger"),
        (
            lambda at: _linked(at / "export" / "hf" / "weights", at / "student" / "hf" / "weights"),
            "found a link",
        ),
    ],
)
def test_without_a_whole_export_of_the_newest_work_nothing_but_caches_goes(tmp_path, harm, told):
    run(tmp_path)
    assert rubbish(tmp_path, "intermediate")
    harm(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=told) as refused:
        rubbish(tmp_path, "intermediate")
    assert "\n" not in str(refused.value) and str(tmp_path / "export") in str(refused.value)
    assert everything(tmp_path) == before
    assert all(item.path.name.startswith(".") for item in rubbish(tmp_path))


def _linked(path, target):
    path.unlink()
    path.symlink_to(target)


def test_a_training_that_was_given_up_before_the_export_goes(tmp_path):
    kill(start(TRAINING, tmp_path / "scratch"))
    run(tmp_path)
    assert "scratch" in names_of(rubbish(tmp_path, "intermediate"), tmp_path)


def test_a_file_that_has_a_name_elsewhere_frees_nothing(tmp_path):
    run(tmp_path / "one")
    os.link(tmp_path / "one" / "student" / "hf" / "weights", tmp_path / "other")
    items = rubbish(tmp_path / "one", "intermediate")
    (student,) = [item for item in items if item.path.name == "student"]
    assert student.bytes == weight(student.path) - 1000
    assert remove(items) == sum(item.bytes for item in items)
    assert (tmp_path / "other").read_bytes() == b"w" * 1000


def test_what_is_no_workspace_is_left_alone(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "homework.txt").write_text("x")
    assert not is_workspace(tmp_path)
    for level in ("caches", "intermediate"):
        with pytest.raises(ValueError, match=f"{tmp_path}: expected a workspace, found neither"):
            rubbish(tmp_path, level)
    run(tmp_path / "run", ["teacher"])
    inside = Item(tmp_path / "run" / "teacher", 0, "")
    with pytest.raises(ValueError, match="expected a part of a workspace"):
        remove([inside, Item(tmp_path / "student", 0, "")])
    assert inside.path.is_dir() and (tmp_path / "student" / "homework.txt").is_file()
    with pytest.raises(ValueError, match="expected a level of caches, intermediate, found 'all'"):
        rubbish(tmp_path / "run", "all")


def test_nothing_goes_while_a_stage_outlives_its_run(tmp_path):
    run(tmp_path, ["teacher"])
    process = start(HOLDING, tmp_path / ".stage.lock")
    with pytest.raises(ValueError, match="expected nobody at work"):
        rubbish(tmp_path)
    kill(process)
    assert rubbish(tmp_path) == []


REMOVING = """
import os, signal, sys
from pathlib import Path
from nemo_minitron.workspace.inventory import remove, rubbish
removed = []
def watch(event, arguments):
    if event == "os.remove":
        removed.append(arguments)
        if len(removed) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
items = rubbish(Path(sys.argv[1]), "intermediate")
print("there", flush=True)
sys.addaudithook(watch)
remove(items)
"""


def test_a_removal_that_is_killed_is_ended_by_the_next(tmp_path):
    run(tmp_path)
    whole = len(everything(tmp_path / "student"))
    process = start(REMOVING, tmp_path)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.communicate()
    assert (
        0 < len(everything(tmp_path / ".student.old.partial")) < whole
        and not (tmp_path / "student").exists()
    )
    assert "student" not in states(tmp_path)
    remove(rubbish(tmp_path, "intermediate"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(KEPT)


def test_names_agree_with_those_who_write_there():
    assert set(LOCKS) < set(TRACES)
