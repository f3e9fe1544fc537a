"""A cascade of cuts beside one cut, killed and run again, on the real engine."""

import json
import shutil
from dataclasses import asdict

import huggingface_hub
import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import load_config
from nemo_minitron.flows.evaluate_checkpoint import teacher_of
from nemo_minitron.workspace.artifacts import verify_tree
from nemo_minitron.workspace.layout import Workspace, model_in
from nemo_minitron.workspace.manifest import read_manifest, write_json
from tests.support.hub import COMMIT, serve
from tests.support.processes import until
from tests.support.runs import minitron, settings, started

STAGES = ("teacher", "scores", "plan", "pruned", "student", "report", "export")


def words(workspace, teacher, corpus):
    dropped = ("plan.", "evaluate.tasks", "evaluate.from_scratch")
    own = [word for word in settings(workspace, teacher, corpus) if not word.startswith(dropped)]
    quick = ["score.importance=magnitude", "trainer.max_steps=6", "evaluate.task_limit=8"]
    return [*own, "evaluate.prompts=0", "evaluate.tasks=[held_out_choice]", *quick]


def made(folder):
    return read_manifest(folder).started


@pytest.mark.slow
def test_a_killed_cascade_repeats_no_step_and_stands_beside_one_cut_in_one_report(
    served, tmp_path, teacher, corpus
):
    place = tmp_path / "cascade"
    arguments = [
        "run", *words(place, teacher, corpus), "cascade.sizes=[{ffn:24},{ffn:16}]", "launch.kind=inline",
    ]  # fmt: skip
    process = started(*arguments, env=served)
    log = place / "steps" / "2" / "student" / "state" / "metrics.jsonl"
    until(lambda: process.poll() is not None or log.is_file(), 240, 0.05)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.wait()
    one = {name: made(place / "steps" / "1" / name) for name in STAGES}
    two = {name: made(place / "steps" / "2" / name) for name in STAGES[:4]}
    assert not (place / "steps" / "one-shot").exists()
    done = minitron(*arguments, env=served)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"model   {place / 'steps' / '2' / 'export'}" in done.stdout
    assert {name: made(place / "steps" / "1" / name) for name in STAGES} == one
    assert {name: made(place / "steps" / "2" / name) for name in two} == two
    report = json.loads((place / "report" / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "student", "step-1", "one-shot"]
    sizes = {name: row["parameters"] for name, row in report["models"].items()}
    assert sizes["teacher"] > sizes["step-1"] > sizes["student"] == sizes["one-shot"]
    compared = {(row["model"], row["task"]) for row in report["compared"]}
    assert {("one-shot", "held_out_choice"), ("step-1", "held-out text")} <= compared
    page = (place / "report" / "report.html").read_text()
    assert "<th>one-shot</th>" in page and "<th>step-1</th>" in page

    def manifest(name, artifact):
        return read_manifest(place / "steps" / name / artifact)

    steps = [
        manifest(name, "student").config["trainer"]["max_steps"] for name in ("1", "2", "one-shot")
    ]
    assert steps == [6, 6, 12]  # as many tokens in all
    fingerprints = [
        {item.path: item.fingerprint for item in manifest(name, "student").inputs}
        for name in ("1", "2")
    ]
    source = manifest("1", "teacher").inputs[0].fingerprint
    assert source in fingerprints[1].values()  # the second step learns from the first source too
    last = json.loads((place / "steps" / "2" / "report" / "report.json").read_text())
    assert last["models"]["teacher"]["parameters"] == sizes["teacher"]
    exports = [place / "steps" / name / "export" for name in ("1", "2", "one-shot")]
    assert [teacher_of(export) for export in exports] == [(str(teacher.resolve()), None)] * 3
    outcomes = json.loads((place / "cascade.json").read_text())["steps"]
    assert [row["name"] for row in outcomes] == ["one-shot", "step-1", "step-2"]
    assert (place / "steps" / "2" / "tokens").is_symlink() and verify_tree(place / "steps" / "2")[
        1
    ] == []


@pytest.fixture
def hub(tmp_path, teacher):
    """A hub with the teacher in bfloat16, and a card that names its licence; what a process finds it by."""
    import torch
    import transformers

    folder = shutil.copytree(teacher, tmp_path / "served")
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlicense_link: '# no link'\n---\n# Tiny\n")
    with serve({"org/tiny": folder}) as served:
        yield {
            "HF_ENDPOINT": served.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip


def test_each_step_cuts_what_the_one_before_gave_and_goes_out_as_one_cut_of_the_source_does(
    served, hub, tmp_path, teacher, corpus
):
    place = tmp_path / "cascade"
    quick = [*words(place, "org/tiny", corpus), "evaluate.tasks=[]", "trainer.max_steps=2"]
    arguments = ["run", *quick, "cascade.sizes=[{ffn:24},{ffn:16}]", "cascade.one_shot=false"]
    corrected = ["correct.enabled=true", "correct.batch_size=4"]
    done = minitron(*arguments, *corrected, "launch.kind=inline", env={**served, **hub})
    assert done.returncode == 0, done.stderr[-3000:]
    plans = [place / "steps" / number / "plan" / "plan.json" for number in "12"]
    sizes = [json.loads(path.read_text()) for path in plans]
    before, after = [[size[name]["ffn"] for size in sizes] for name in ("before", "after")]
    assert (before[1], after) == (24, [24, 16]) and before[0] > 24
    report = json.loads((place / "report" / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "student", "step-1"]
    told = [
        f"({sizes[0]['cost_before']['parameters']:,} parameters)",
        f", in 2 steps, each of them distilled, the last from a model of {sizes[1]['cost_before']['parameters']:,} ",
    ]
    losses = []
    for number, text in zip("12", told, strict=True):
        export = place / "steps" / number / "export"
        assert {entry.dtype for entry in open_checkpoint(export).entries.values()} == {"BF16"}
        card = huggingface_hub.ModelCard((export / "README.md").read_text())
        assert (card.data.base_model, card.data.license) == ("org/tiny", "mit")
        assert card.data.model_name.startswith("tiny-minitron-")
        text = f"from `org/tiny` at `{COMMIT}`{'' if number == '2' else ' '}{text}"
        assert text in card.text and "- `license_link`: `# no link`" in card.text
        measured = json.loads((place / "steps" / number / "report" / "report.json").read_text())
        assert measured["dtype"] == "bfloat16"
        losses.append(measured["models"]["teacher"]["loss"])
    assert losses[0] == losses[1]  # the corrected teacher, by each step in the dtype that goes out
    first = (str((place / "correct" / "hf").resolve()), None)
    assert [teacher_of(place / "steps" / number / "export") for number in "12"] == [first, first]


@pytest.mark.parametrize("source", ["hub", "own"])
def test_without_correction_a_step_knows_what_the_user_called_the_source(tmp_path, teacher, source):
    from nemo_minitron.stages.inputs import Source
    from nemo_minitron.stages.origin import origin_of

    place = Workspace(tmp_path / "cascade")
    step, known = place.step("1"), Source(str(teacher), "org/tiny", COMMIT)
    if source == "own":
        shutil.copytree(teacher, model_in(place.pretrain))
        known = Source("pretrain/hf", "pretrain/hf", None)
    lies = (place.root / known.path).resolve()
    for workspace, pointer in [(place, known), (step, Source(str(lies), str(lies), None))]:
        workspace.teacher.mkdir(parents=True)
        write_json(workspace.source, asdict(pointer))
    found = origin_of(step)
    assert (found.pointer, found.cuts, found.folder) == (known, 0, place.root / known.path)
    assert found.name == ("tiny" if source == "hub" else "cascade")
    write_json(place.source, asdict(Source(str(tmp_path), "org/other", COMMIT)))  # rebuilt
    assert origin_of(step).pointer.given == str(lies)


def test_a_deployed_cascade_learns_from_the_step_before_where_that_is_asked_for(
    server, tmp_path, teacher, corpus
):
    from nemo_minitron.flows.cascade import _cut_to, _step, check
    from nemo_minitron.flows.deploy import deployment
    from nemo_minitron.flows.forms import composed

    place = tmp_path / "deployed"
    given = {"sizes": [{"ffn": 24}, 20000], "workspace": str(place)}
    found = deployment("c", "cascade", "config", ["evaluate.min_retention=0.5"], given, None, None)
    assert found.flow_name == "cascade" and found.parameters["sizes"] == given["sizes"]
    base = composed("config", [*words(place, teacher, corpus), "cascade.teacher=previous"])
    base.cascade.sizes = given["sizes"]
    check(base)
    first, before = tmp_path / "first", tmp_path / "before"
    own = _step(base, "2", before, first, last=True)
    _cut_to(own, 20000)
    assert own.distill.teacher is None and own.evaluate.teacher == str(first)
    assert own.source.model == str(before) and own.plan.budget.params == 20000
    base.cascade.teacher = "source"
    assert _step(base, "2", before, first, last=True).distill.teacher == str(first)
    assert _step(base, "1", first, first, last=False).distill.teacher is None
    assert _step(base, "1", first, first, last=False).evaluate.tasks == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["cascade.sizes=[{fnn:24}]"], "cascade.sizes[0].fnn: expected a whole number for one of hidden, ffn"),
        (["cascade.sizes=[{ffn:24},wide]"], "cascade.sizes[1]: expected sizes by axis, as in {ffn: 9216}, or"),
        (["cascade.sizes=[{ffn:24}]", "plan.ffn=20"], "plan.ffn: either sizes of one cut or cascade.sizes, found"),
        (["cascade.sizes=[0]"], "cascade.sizes: expected at least 1, found 0"),
        (
            ["cascade.sizes=[{ffn:24}]", "cascade.teacher=previous", "distill.teacher=x"],
            "distill.teacher: either one teacher or cascade.teacher=previous, found both",
        ),
    ],
)  # fmt: skip
def test_a_cascade_that_contradicts_itself_is_refused(tmp_path, teacher, corpus, more, text):
    from nemo_minitron.flows.cascade import check
    from nemo_minitron.flows.forms import composed

    with pytest.raises(ValueError) as refused:
        check(composed("config", [*words(tmp_path / "ws", teacher, corpus), *more]))
    assert text in str(refused.value)


def test_the_one_shot_is_trained_for_as_long_as_all_steps(tmp_path, teacher, corpus, monkeypatch):
    from nemo_minitron.flows import cascade

    asked = []
    monkeypatch.setattr(cascade, "compress", lambda config, command: [asked.append(config)])
    own = [
        *words(tmp_path / "cascade", teacher, corpus),
        "cascade.sizes=[{ffn:24},{ffn:20},{ffn:16}]",
    ]
    for more in ([], ["+trainer.max_epochs=2", "data.train.samples=96"]):
        asked.clear()
        cascade._steps(load_config("config", [*own, *more]), teacher, None)
        assert [config["trainer"]["max_steps"] for config in asked] == [6, 6, 6, 18]
        epochs = [2, 2, 2, 6] if more else [None] * 4
        assert [config["trainer"].get("max_epochs") for config in asked] == epochs
