"""lm-eval's tasks: those that the package adds, and what is asked of the hub."""

import json
import math
import os
import random
import subprocess
import sys
from urllib.parse import unquote

import pytest
from datasets import Dataset

from nemo_minitron.evaluation.held_out_tasks import documents_of, write_held_out_tasks
from nemo_minitron.evaluation.lm_eval import run_task
from nemo_minitron.evaluation.lm_tasks.xlsum import fifth, rouge
from nemo_minitron.models.causal_lm import load_model, load_tokenizer
from tests.support.hub import serve

TEXT = "the dog that saw a cat ran home and the cat that saw it sat down to eat a fish"
PROGRAM = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from nemo_minitron.evaluation.held_out_tasks import write_held_out_tasks
from nemo_minitron.evaluation.lm_eval import run_task
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], max_position_embeddings=2048).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
write_held_out_tasks([" ".join(["%d words of text" % i] * 60) for i in range(8)], Path("."))
# all with one folder: of each lm-eval reads its thousands of tasks, for seconds
for task in ("held_out_choice", "own", "xlsum_en", "xlsum_en@0"):
    found = run_task(model, tokenizer, task, "own", Path("."), 4, 2)
    print("RESULT", json.dumps([task, found.metrics, found.documents, found.data_set]))
"""
OWN = """task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def article(i):
    words = TEXT.split()
    text = [words[(i * 7 + j) % len(words)] for j in range(24)]
    return {"id": str(i), "title": text[0], "text": " ".join(text), "summary": " ".join(text[:6])}


@pytest.fixture
def hub(tmp_path):
    """The hub with XL-Sum's rows where it exports them: 30 test articles, 20 others, and a third split."""
    for split, rows in (("test", range(30)), ("validation", range(30, 50)), ("train", range(3))):
        path = tmp_path / "data" / "english" / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        Dataset.from_list([article(i) for i in rows]).to_parquet(str(path))
    with serve({}, {"csebuetnlp/xlsum": tmp_path / "data"}) as hub:
        yield hub


@pytest.mark.parametrize("limit", [3, 40, None])
def test_questions_of_one_document_are_not_taken_for_independent(teacher, tmp_path, limit):
    texts = [" ".join(random.Random(i).choices(TEXT.split(), k=240)) for i in range(5)]
    write_held_out_tasks(texts, tmp_path)
    model, tokenizer = load_model(teacher), load_tokenizer(teacher)
    model.config.max_position_embeddings = 2048
    found = run_task(model, tokenizer, "held_out_choice", None, tmp_path, limit, 8, quiet=True)
    values = found.documents["acc"]
    assert len(values) == (limit or 200)
    questions = (tmp_path / "held_out_choice.jsonl").read_text().splitlines()[: len(values)]
    owners = [
        [n for n, text in enumerate(texts) if json.loads(q)["context"] in text] for q in questions
    ]
    documents = documents_of("held_out_choice@0", tmp_path, limit)
    assert (documents is None) == (limit == 3)
    if documents is None:
        documents = range(3)
    assert [[document] for document in documents] == owners
    sums = [
        sum(v - found.metrics["acc"] for v, d in zip(values, documents, strict=True) if d == n)
        for n in set(documents)
    ]
    error = math.sqrt(sum(s * s for s in sums) * len(sums) / (len(sums) - 1)) / len(values)
    assert found.metrics["acc_stderr"] == pytest.approx(error)
    assert (
        documents_of("held_out_bytes", tmp_path, limit)
        is None
        is documents_of("arc_easy", tmp_path, limit)
    )


def test_a_workspace_with_brackets_in_its_name_answers_its_own_questions(teacher, tmp_path):
    model, tokenizer = load_model(teacher), load_tokenizer(teacher)
    model.config.max_position_embeddings = 2048
    lengths = {"runs1": 5, "runs[1]": 7, "runs": 7}
    found = {}
    for name, count in lengths.items():
        (tmp_path / name).mkdir()
        texts = [" ".join(random.Random(i).choices(TEXT.split(), k=240)) for i in range(count)]
        write_held_out_tasks(texts, tmp_path / name)
    for name in lengths:
        done = run_task(
            model, tokenizer, "held_out_bytes", None, tmp_path / name, None, 8, quiet=True
        )
        found[name] = done.metrics["bits_per_byte"]
    assert found["runs[1]"] == found["runs"] != found["runs1"]


@pytest.mark.slow
def test_xlsum_comes_from_the_hub_after_tasks_with_data_of_their_own(hub, teacher, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "data.jsonl").write_text(
        "".join(json.dumps({"q": f"{i}?"}) + "\n" for i in range(4))
    )
    (tmp_path / "own" / "own.yaml").write_text(OWN.format(path=tmp_path / "own" / "data.jsonl"))
    place = {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd(),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(teacher)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **place}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [
        line.removeprefix("RESULT ")
        for line in done.stdout.splitlines()
        if line.startswith("RESULT")
    ]
    made, own, few, none = map(json.loads, lines)
    assert [made[0], made[3], own[0], own[3]] == ["held_out_choice", None, "own", None]
    assert (few[0], few[3], none[3]) == ("xlsum_en", "csebuetnlp/xlsum", "csebuetnlp/xlsum")
    for _, metrics, documents, _ in (few, none):
        assert set(documents) == {"rougeL", "rouge1", "rouge2"} and len(documents["rougeL"]) == 4
        for name, values in documents.items():
            assert (
                metrics[name] == pytest.approx(sum(values) / 4)
                and 0 <= min(values) <= max(values) <= 1
            )
    assert few[2] != none[2]  # three examples stand before each article, or none
    asked = "\n".join(hub.requests)
    assert "english/test" in unquote(asked) and "english/validation" in unquote(asked)
    assert "english/train/0000.parquet" not in unquote(asked)


def test_xlsum_takes_a_fifth_of_the_articles_and_measures_rouge():
    assert fifth(Dataset.from_list([article(i) for i in range(11)]))["id"] == ["0", "5", "10"]
    document = {"summary": "The dogs ran home"}
    assert rouge(document, [" the dog ran home"]) == {"rougeL": 1.0, "rouge1": 1.0, "rouge2": 1.0}
    turned = rouge(document, ["home ran dogs the"])  # all words, no pair, one in order
    assert turned == {"rougeL": 0.25, "rouge1": 1.0, "rouge2": 0.0}
    assert rouge(document, [""]) == {"rougeL": 0.0, "rouge1": 0.0, "rouge2": 0.0}
