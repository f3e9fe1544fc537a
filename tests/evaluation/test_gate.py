"""The gate between a report and an export, and the cache of measurements."""

import json
import math

import pytest

from nemo_minitron.evaluation.gate import Gate, GateError, measured_of, raise_if_failed
from nemo_minitron.workspace.results import Results


def report(retention=0.9, accuracy=0.5, bits=1.2, text="t"):
    student = {
        "retention": retention,
        "perplexity": 10.0,
        "tasks": {
            "choice": {"acc": accuracy, "acc_stderr": 0.01},
            "bytes": {"bits_per_byte": bits},
        },
    }
    better = {"choice": {"acc": True}, "bytes": {"bits_per_byte": False}}
    return {"models": {"student": student}, "better": better, "measured_on": {"text": text}}


def previous(**changes):
    student = report()["models"]["student"]
    return {"student": {**student, **changes}, "measured_on": {"text": "t"}}


def test_retention_and_floors_in_both_directions():
    gate = Gate(0.8, (("choice", "acc", 0.4), ("bytes", "bits_per_byte", 1.3)))
    raise_if_failed(gate.rows(report()))
    for weak, name in (
        (report(retention=0.7), "perplexity retention: 70.0%, asked for >= 80.0%"),
        (report(retention=math.nan), "perplexity retention: nan%"),
        (report(accuracy=0.39), "choice acc: 0.39, asked for >= 0.4"),
        (report(bits=1.31), "bytes bits_per_byte: 1.31, asked for <= 1.3"),
    ):
        with pytest.raises(GateError, match=name.replace("%", ".")) as failed:
            raise_if_failed(gate.rows(weak))
        assert [row[3] for row in failed.value.rows].count("") == 1


def test_a_floor_for_what_was_not_measured_is_the_users_mistake():
    with pytest.raises(ValueError, match="other:acc was not measured"):
        Gate(floors=(("other", "acc", 0.1),)).rows(report())


def test_what_was_asked_in_a_chat_is_not_held_against_what_was_not():
    told = "asked otherwise"
    chat = report()
    chat["measured_on"] = {**chat["measured_on"], "asked": {"chat": True}}
    with pytest.raises(ValueError, match=told):
        Gate(previous=previous(), max_regression=0.02).rows(chat)
    before = previous()
    before["measured_on"] = {**before["measured_on"], "asked": {"chat": True}}
    raise_if_failed(Gate(previous=before, max_regression=0.02).rows(chat))


def test_no_measure_may_fall_behind_an_earlier_export():
    raise_if_failed(
        Gate(previous=previous(), max_regression=0.02).rows(report(accuracy=0.491, bits=1.22))
    )
    for weak in (report(accuracy=0.48), report(bits=1.23)):
        with pytest.raises(GateError, match="against the previous export"):
            raise_if_failed(Gate(previous=previous(), max_regression=0.02).rows(weak))
    with pytest.raises(GateError, match="perplexity against the previous export"):
        raise_if_failed(Gate(previous=previous(perplexity=9.7), max_regression=0.02).rows(report()))
    with pytest.raises(
        ValueError, match=r"with another tokenizer or other limits \(another text\)"
    ):
        raise_if_failed(Gate(previous=previous()).rows(report(text="another")))
    with pytest.raises(ValueError, match="sums was measured of it and is not measured now"):
        raise_if_failed(Gate(previous=previous(tasks={"sums": {"acc": 0.1}})).rows(report()))
    renamed = report()
    renamed["models"]["student"]["tasks"]["choice"] = {"acc (strict)": 0.01}
    with pytest.raises(ValueError, match="choice acc was measured of it and is not measured now"):
        Gate(previous=previous()).rows(renamed)


def test_only_the_tasks_that_both_measured_must_ask_the_same(tmp_path):
    now, before = report(), previous()
    now["measured_on"]["tasks"] = {
        "choice": {"own": "1"},
        "bytes": {"own": None},
        "new": {"own": "2"},
    }
    before["measured_on"]["tasks"] = {"choice": {"own": "1"}, "bytes": {"own": None}}
    raise_if_failed(Gate(previous=before).rows(now))
    now["measured_on"]["tasks"]["choice"] = {"own": "3"}
    with pytest.raises(ValueError, match="choice was measured of it with other questions"):
        Gate(previous=before).rows(now)


def test_an_export_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results; name the folder of an export"):
        measured_of(tmp_path)
    (tmp_path / "minitron.json").write_text(json.dumps({"results": previous()}))
    assert measured_of(tmp_path) == previous()


def test_results_are_found_by_all_that_decides_them_and_a_damaged_one_counts_as_none(tmp_path):
    results, key = Results(tmp_path / "results"), {"what": "choice", "model": "abc", "limit": None}
    assert results.get(key) is None
    results.put(key, {"acc": 0.5})
    assert results.get(dict(reversed(key.items()))) == {"acc": 0.5}
    assert results.get({**key, "limit": 5}) is None
    (path,) = (tmp_path / "results").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert results.get(key) is None
