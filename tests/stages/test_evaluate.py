"""Evaluation of a finished run: own lm-eval tasks, what is kept when one fails, two ranks, the gate."""

import gc
import json
import multiprocessing
import shutil
from importlib.metadata import version

import pytest
import torch
from transformers import PreTrainedModel

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation import speed
from nemo_minitron.evaluation.lm_eval import check_tasks, manager_of
from nemo_minitron.evaluation.measurements import SPEED, Unit, work
from nemo_minitron.evaluation.report import speeds, unserved
from nemo_minitron.evaluation.task_files import task_print
from nemo_minitron.launch.failures import TRANSIENT, kind_of
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.stages.evaluate import _bench
from nemo_minitron.stages.run import run_stage
from tests.support.models import begin_texts
from tests.support.runs import settings
from tests.support.two_ranks import on_two_ranks

LINES = [{"q": f"the model reads a file {i}", "a": ["and", "waits"], "n": i % 2} for i in range(12)]
DATA = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
"""
KINDS = {
    "own_choice": """tag: [own_tag]
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{a}}"
doc_to_target: n
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_writing": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a[n]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
    "own_likely": """tag: [own_tag]
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{a[n]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "own_broken": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{a}}"
doc_to_target: n
process_results: !function broken.fail
metric_list: [{metric: acc}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks of one's own, one of each kind, and one whose code fails."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name, rest in KINDS.items():
        (folder / f"{name}.yaml").write_text(
            DATA.format(name=name, path=folder / "data.jsonl") + rest
        )
    (folder / "broken.py").write_text(
        "def fail(doc, results):\n    raise KeyError('no such field')\n"
    )
    (folder / "own_group.yaml").write_text(
        "group: own_group\ntask: [own_choice, own_broken, hellaswag]\n"
    )
    return folder


@pytest.fixture
def words(finished, tmp_path, teacher, corpus, tasks):
    """A copy of a finished run without its measurements, and the settings of an evaluation with own tasks."""
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("report", "export", "results"):
        shutil.rmtree(workspace / name)
    own = f"evaluate.tasks=[{','.join(list(KINDS)[:3])}]"
    return workspace, [
        *settings(workspace, teacher, corpus), own, f"evaluate.task_dir={tasks}", "evaluate.speed=false",
        "evaluate.from_scratch=false", "evaluate.prompts=4", "evaluate.written_tokens=6", "evaluate.task_limit=null",
    ]  # fmt: skip


def called(capsys, *arguments):
    """Exit code and last line of the error output of a command, called in this process."""
    capsys.readouterr()
    code = main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    return code, lines[-1] if lines else ""


def alike(one, other):
    """Asserts that two JSON objects hold the same, numbers but for the order of sums."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            alike(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    else:
        assert one == other


def read(workspace):
    return json.loads((workspace / "report" / "report.json").read_text())


def test_own_tasks_of_every_kind_and_two_ranks_find_the_same(words, tmp_path, capsys):
    workspace, arguments = words
    apart = shutil.copytree(workspace, tmp_path / "apart" / "run")
    assert called(capsys, "evaluate", *arguments)[0] == 0
    report = read(workspace)
    for row in report["models"].values():
        assert set(row["tasks"]) == set(list(KINDS)[:3])
        assert row["tasks"]["own_choice"]["acc"] in [i / 12 for i in range(13)]
        assert row["tasks"]["own_rolling"]["bits_per_byte"] > 0
        assert row["tasks"]["own_writing"]["exact_match"] >= 0
    assert report["better"]["own_rolling"]["bits_per_byte"] is False
    assert report["better"]["own_choice"]["acc_norm"] is True
    measures = {
        (row["task"], row["metric"]) for row in report["compared"] if row["model"] == "student"
    }
    assert ("held-out text", "loss") in measures and ("own_choice", "acc") in measures
    assert all(
        row["documents"] == 12 for row in report["compared"] if row["task"] != "held-out text"
    )
    assert all(1 < row["documents"] <= 16 for row in report["compared"])
    assert len(report["writing"]) == 4 and set(report["writing"][0]) >= {
        "prompt",
        "text",
        "teacher",
        "student",
    }
    teacher = report["models"]["teacher"]
    assert (teacher["retention"], teacher["top1"], teacher["writing"]["agreement"]) == (
        1.0,
        None,
        1.0,
    )
    there = [word.replace(str(workspace), str(apart)) for word in arguments]
    shared = on_two_ranks("evaluate", *there)
    assert shared.returncode == 0, shared.stderr[-3000:]
    alike(read(apart), report)


def test_a_task_that_fails_costs_no_other(words, capsys):
    workspace, arguments = words
    with_it = "evaluate.tasks=[own_choice,own_broken,own_rolling]"
    code, last = called(capsys, "evaluate", *arguments, with_it)
    assert code == 1
    assert (
        "own_broken of teacher: KeyError: 'no such field'" in last
        and "is kept for the next try" in last
    )
    assert not (workspace / "report").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (workspace / "results").glob("*.json")}
    assert called(capsys, "evaluate", *arguments, "evaluate.tasks=[own_choice,own_rolling]")[0] == 0
    now = {path.name: path.stat().st_mtime_ns for path in (workspace / "results").glob("*.json")}
    assert now == kept  # nothing was measured twice


def test_a_task_is_measured_again_when_its_own_questions_have_changed_and_only_then(
    words, tmp_path
):
    _, arguments = words
    folder, data = tmp_path / "own", tmp_path / "elsewhere" / "questions.jsonl"
    folder.mkdir()
    data.parent.mkdir()
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    names = ("held_out_mine", "own_quiz", "own_coded", "own_split")
    for name in names:
        kind = KINDS["own_choice"].replace("tag: [own_tag]\n", "")
        (folder / f"{name}.yaml").write_text(DATA.format(name=name, path=data) + kind)
    with (folder / "own_coded.yaml").open("a") as file:
        file.write("process_docs: !function helper.same\n")
    (folder / "helper.py").write_text("def same(docs):\n    return docs\n")
    base = (folder / "own_split.yaml").read_text()
    (folder / "base").write_text(base.replace("task: own_split\n", ""))
    (folder / "own_split.yaml").write_text("task: own_split\ninclude: base\n")
    more = [
        f"evaluate.task_dir={folder}",
        f"evaluate.tasks=[{','.join(names)}]",
        "evaluate.prompts=0",
    ]

    def keys():
        """What decides each measurement of the student."""
        bench, _ = _bench(load_config("config", [*arguments, *more]))
        return {unit.what: bench.key(unit) for unit in bench.units() if unit.model == "student"}

    def changed():
        nonlocal before
        was, before = before, keys()
        return [name for name in before if before[name] != was[name]]

    before = keys()
    assert set(before) == {*names, "text"} and changed() == []
    (folder / "notes.txt").write_text("nobody's")
    (folder / "other.yaml").write_text(DATA.format(name="other", path=data) + KINDS["own_rolling"])
    assert changed() == []
    (folder / "helper.py").write_text("def same(docs):\n    return docs.select(range(6))\n")
    assert changed() == ["own_coded"]
    with (folder / "base").open("a") as file:
        file.write("fewshot_delimiter: ' '\n")
    assert changed() == ["own_split"]
    with (folder / "held_out_mine.yaml").open("a") as file:
        file.write("description: 'The model reads. '\n")
    assert changed() == ["held_out_mine"]
    data.write_text("".join(json.dumps({**line, "n": 1 - line["n"]}) + "\n" for line in LINES))
    assert changed() == list(names)


def test_own_tasks_are_read_without_lm_evals_own_and_what_is_asked_beyond_them_with_it(tasks):
    """In one test: to read what lm-eval has takes nine seconds."""
    near = manager_of(str(tasks), "own_choice", "xlsum_en")
    assert set(near.all_tasks) == {*KINDS, "own_tag", "own_group", "xlsum_en"}
    for asked in ("own_group", "own_tag", "hellaswag", "no_such_task"):
        whole = manager_of(str(tasks), "own_choice", asked)
        assert {"hellaswag", "own_choice", "own_group"} <= set(whole.all_tasks)
    assert task_print("hellaswag", str(tasks)) == {"lm_eval": version("lm_eval"), "own": None}
    code = tasks / "broken.py"
    before = code.read_text(), task_print("own_group", str(tasks))
    code.write_text(before[0] + "# changed\n")
    assert task_print("own_group", str(tasks)) != before[1]
    code.write_text(before[0])
    assert task_print("own_group", str(tasks)) == before[1]
    for name, said in (
        (
            "own_chioce",
            r"^evaluate.tasks: lm-eval knows no task 'own_chioce' .*; nearest: own_choice",
        ),
        ("own_tag", "'own_tag' is a tag of several tasks; name them: own_choice, own_likely$"),
        ("humaneval@3", "humaneval@3: the YAML says num_fewshot: 0, .*; leave @3 out$"),
        ("bbh_zeroshot@3", "bbh_zeroshot@3: the YAML of bbh_zeroshot_.* says num_fewshot: 0"),
        ("openllm", r"'openllm' is a group without a number .*: arc_challenge@25, hellaswag@10, "),
    ):
        with pytest.raises(ValueError, match=said):
            check_tasks(["own_choice", name], str(tasks))
    for name in ("minitron", "minitron_code", "reasoning", "instruct", "code"):
        config = load_config("config", [f"suite={name}"])
        assert len(config.evaluate.tasks) >= 4
        assert config.evaluate.chat == (name == "instruct")
        check_tasks(config.evaluate.tasks, str(tasks))


def test_a_measure_that_one_model_lacks_is_not_compared(words, capsys, tmp_path, monkeypatch):
    from nemo_minitron.evaluation import measurements

    whole = measurements.Bench._task

    def partly(bench, unit):
        found = whole(bench, unit)
        if unit.model == "student":
            del found["documents"]["acc_norm"], found["metrics"]["acc_norm"]
        return found

    monkeypatch.setattr(measurements.Bench, "_task", partly)
    workspace, arguments = words
    assert called(capsys, "evaluate", *arguments, "evaluate.tasks=[own_choice]")[0] == 0
    measures = {row["metric"] for row in read(workspace)["compared"] if row["task"] == "own_choice"}
    assert measures == {"acc"}


def test_the_student_is_measured_as_it_goes_out(words, capsys, tmp_path):
    workspace, arguments = words
    arguments = [*arguments, "evaluate.tasks=[own_choice]", "export.dtype=bfloat16"]
    bench, _ = _bench(load_config("config", arguments))
    dtypes = {name: bench._model(name).dtype for name in bench.folders}
    assert dtypes == {"teacher": torch.float32, "pruned": torch.float32, "student": torch.bfloat16}
    assert (
        called(capsys, "evaluate", *arguments)[0] == 0
        and called(capsys, "export", *arguments)[0] == 0
    )
    other = [word.replace(str(workspace), str(tmp_path / "again")) for word in arguments]
    other = [*other, f"evaluate.model={workspace / 'export'}"]
    assert called(capsys, "download", *other)[0] == 0 and called(capsys, "evaluate", *other)[0] == 0
    one, two = (read(place)["models"]["student"] for place in (workspace, tmp_path / "again"))
    assert one["loss"] == two["loss"] and one["tasks"] == two["tasks"]


def test_bad_input_is_refused_in_one_line_before_anything_is_measured(words, capsys):
    workspace, arguments = words
    for word, text in (
        ("evaluate.tasks=[own_choice@many]", "expected TASK@SHOTS, as in arc_challenge@25"),
        (
            "evaluate.speed=true evaluate.speed_batches=[]",
            "evaluate.speed_batches: expected at least one size",
        ),
        ("evaluate.floors=[own_choice:acc]", "expected TASK:METRIC:VALUE"),
        ("evaluate.written_tokens=100000", "evaluate.written_tokens: expected at most"),
        (f"evaluate.previous={workspace}", "holds no results; name the folder of an export"),
    ):
        code, last = called(capsys, "evaluate", *arguments, *word.split())
        assert code == 2 and text in last, last
    assert not (workspace / "results").exists()


def test_held_out_text_is_read_as_the_tokenizer_begins_it_and_measured_again_when_it_changes(
    teacher, corpus, tmp_path, capsys
):
    model = shutil.copytree(teacher, tmp_path / "model")
    words = [
        *settings(tmp_path / "w", model, corpus), f"evaluate.model={model}", f"evaluate.teacher={model}",
        "evaluate.speed=false", "evaluate.tasks=[]", "evaluate.prompts=2", "evaluate.written_tokens=4",
    ]  # fmt: skip
    assert called(capsys, "evaluate", *words)[0] == 0
    before = read(tmp_path / "w")
    begin = begin_texts(model)
    shutil.rmtree(tmp_path / "w" / "report")  # what was measured stays, in results/
    assert called(capsys, "evaluate", *words)[0] == 0
    after = read(tmp_path / "w")
    assert "begin" not in before["measured_on"] and after["measured_on"]["begin"] == [begin]
    losses = [report["models"]["student"]["loss"] for report in (before, after)]
    assert losses[0] != losses[1]
    prompts = [text["prompt"] for text in after["writing"]]
    assert len(prompts) == 2 and all(text.startswith("<s>") for text in prompts)


def test_tasks_need_a_tokenizer_that_marks_begin_or_end(teacher, tmp_path):
    """lm-eval fails with "'None' is not an instance of 'Sequence'" behind hours of training."""
    from nemo_minitron.config.compose import load_config
    from nemo_minitron.stages.evaluate import _check_models

    folder = shutil.copytree(teacher, tmp_path / "m")
    asked = load_config("config", ["evaluate.tasks=[held_out_choice]"])
    _check_models(asked, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            held = json.loads((folder / name).read_text())
            left = {k: v for k, v in held.items() if k not in ("bos_token", "eos_token")}
            (folder / name).write_text(json.dumps(left))
    with pytest.raises(ValueError, match=r"m: its tokenizer has neither a begin nor an end token"):
        _check_models(asked, folder)
    _check_models(load_config("config", []), folder)


def test_the_gate_holds_until_it_is_forced_and_the_card_says_so(words, capsys):
    workspace, arguments = words
    arguments = [*arguments, "evaluate.tasks=[own_choice]"]
    strict = [*arguments, "evaluate.floors=[own_choice:acc:2]"]
    for stage in ("evaluate", "export"):
        code, last = called(capsys, stage, *strict)
        assert code == 1 and "own_choice acc: " in last and "asked for >= 2" in last
        assert not (workspace / "export").exists()
    assert called(capsys, "export", *strict, "export.force=true")[0] == 0
    card = (workspace / "export" / "README.md").read_text()
    assert str(workspace.parent.parent) not in card  # nor any other path of this machine
    assert "Exported by force: the quality gate failed" in card and "required was &gt;= 2" in card
    # the next version is held against this one
    results = json.loads((workspace / "export" / "minitron.json").read_text())["results"]
    assert set(results["student"]["tasks"]) == {"own_choice"}
    old = shutil.copytree(workspace / "export", workspace.parent / "old")
    assert called(capsys, "evaluate", *arguments, f"evaluate.previous={old}")[0] == 0
    lineage = json.loads((old / "minitron.json").read_text())
    lineage["results"]["student"]["perplexity"] /= 2
    (old / "minitron.json").write_text(json.dumps(lineage))
    code, last = called(capsys, "evaluate", *arguments, f"evaluate.previous={old}")
    assert code == 1 and "perplexity against the previous export" in last
    # a verdict outlives the command that asked for it
    shutil.rmtree(workspace / "export")
    code, last = called(capsys, "export", *arguments)
    assert code == 1 and "perplexity against the previous export" in last
    assert not (workspace / "export").exists()
    assert called(capsys, "export", *arguments, "export.force=true")[0] == 0
    assert (
        "perplexity against the previous export" in (workspace / "export" / "README.md").read_text()
    )
    assert called(capsys, "evaluate", *arguments, "evaluate.floors=[own_choice:acc:0]")[0] == 0
    assert called(capsys, "export", *arguments)[0] == 0
    assert "by force" not in (workspace / "export" / "README.md").read_text()


def test_only_the_student_that_was_measured_and_the_plan_it_was_cut_by_go_out(words, capsys):
    workspace, arguments = words
    arguments = [*arguments, "evaluate.tasks=[]"]
    assert called(capsys, "evaluate", *arguments)[0] == 0
    page = workspace / "report" / "report.html"
    assert "What was cut" in page.read_text()
    manifest = workspace / "student" / "manifest.json"
    whole = manifest.read_text()
    student = json.loads(whole)
    manifest.write_text(json.dumps({**student, "finished": "2031-01-01T00:00:00.000000+00:00"}))
    code, last = called(capsys, "export", *arguments)
    assert code == 2 and "measures an earlier student of this workspace" in last
    manifest.write_text(whole)
    assert called(capsys, "plan", *arguments, "plan.hidden=18")[0] == 0
    code, last = called(capsys, "export", *arguments)
    assert code == 2 and "made from another plan than the one there now" in last
    assert called(capsys, "report", str(workspace))[0] == 0
    assert "What was cut" not in page.read_text()
    assert not (workspace / "export").exists()


def test_a_perplexity_is_not_compared_by_its_likelihoods(words, capsys, monkeypatch):
    workspace, arguments = words
    monkeypatch.setattr(
        multiprocessing, "Pool", None
    )  # forked processes hang where there are threads
    capsys.readouterr()
    assert main(["evaluate", *arguments, "evaluate.tasks=[own_likely]", "--json"]) == 0
    json.loads(capsys.readouterr().out)  # and nothing else
    report = read(workspace)
    assert report["models"]["student"]["tasks"]["own_likely"]["perplexity"] > 1
    compared = {row["metric"] for row in report["compared"] if row["task"] == "own_likely"}
    assert compared == {"acc"}


def test_a_broken_line_during_a_task_is_worth_another_try(words, capsys, tasks, tmp_path):
    folder = shutil.copytree(tasks, tmp_path / "unlucky")
    (folder / "broken.py").write_text(
        "def fail(doc, results):\n    raise ConnectionError('no hub')\n"
    )
    config = load_config(
        "config", [*words[1], "evaluate.tasks=[own_broken]", f"evaluate.task_dir={folder}"]
    )
    with pytest.raises(
        RuntimeError, match="own_broken of teacher: ConnectionError: no hub"
    ) as failed:
        run_stage("evaluate", config)
    assert kind_of(failed.value) == TRANSIENT


@pytest.mark.slow
def test_speed_has_the_memory_to_itself_and_a_failing_vllm_is_told_and_tried_again(
    words, tmp_path, monkeypatch, teacher
):
    (tmp_path / "path" / "vllm").mkdir(parents=True)
    (tmp_path / "path" / "vllm" / "__init__.py").write_text(
        "raise RuntimeError('no room on the card')"
    )
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    measure, alive = speed.measure_in_process, []

    def models():
        gc.collect()
        return [item for item in gc.get_objects() if isinstance(item, PreTrainedModel)]

    others = models()  # of other tests

    def seen(*given):
        alive.extend(item for item in models() if not any(item is other for other in others))
        return measure(*given)

    monkeypatch.setattr(speed, "measure_in_process", seen)
    config = load_config("config", [
        *words[1], "evaluate.speed=true", "evaluate.tasks=[]", "evaluate.prompts=0", f"evaluate.model={teacher}",
        "evaluate.speed_batches=[1]", "evaluate.contexts=[]", "evaluate.prompt_tokens=16", "evaluate.new_tokens=4",
    ])  # fmt: skip
    bench, _ = _bench(config)
    assert work(bench, Ranks()) == []  # the text of two models, and then their speed
    assert len(bench.units()) == 4 and alive == []
    unit = Unit("student", SPEED)
    assert bench.key(unit)["conditions"]["machine"] and bench.key(unit)["conditions"]["torch"]
    assert "no room on the card" in bench.measure(unit)["vllm"]["failed"]
    assert bench.results.get(bench.key(unit)) is None  # the next evaluation tries again
    rows = {"models": {"student": {"speed": bench.measure(unit)}}}
    assert "no room on the card" in unserved(rows)[0] and len(speeds(rows)) == 1
