"""A configuration of the package with other values in some keys is what Hydra composes from the same words."""

import shutil
from pathlib import Path

import pytest

from nemo_minitron.config import compose
from nemo_minitron.config.compose import CONFIGS, load_config

BY_VALUE = [
    [],
    ["plan.ffn=20", "workspace=/tmp/1e-4", "distill.ce=.1"],
    ["data.train.paths=[a,b]", "trainer.devices=[0,1]", "optim.sched.warmup_steps=null"],
    ["trainer.max_steps=${sum:2,3}", "optim={name: adam, lr: 0.1}", "plan.ffn=1", "plan.ffn=2"],
    ["export.tag='1.10'", "evaluate.tasks=[arc_easy@3]", "training.only=['*.q_proj.*']"],
]
OTHERWISE = [
    ["plan=minitron_4b"], ["recipe=minitron_4b", "plan.ffn=20"], ["+trainer.limit_val_batches=2"], ["~optim.sched"],
    ["++optim.weight_decay=0", "plan.ffn=20"],
]  # fmt: skip


@pytest.mark.parametrize("name", ["config", "demo"])
@pytest.mark.parametrize("words", BY_VALUE, ids=str)
def test_it_is_what_hydra_composes(name, words):
    typed = [compose.as_typed(word) for word in words]
    first = load_config(name, words)
    found = compose._changed(name, typed)
    assert found is not None and repr(found) == repr(first)
    assert repr(found) == repr(compose._by_hydra(name, typed, Path(CONFIGS), None))


@pytest.mark.parametrize("words", OTHERWISE, ids=str)
def test_what_is_more_than_values_is_left_to_hydra(words):
    load_config("config", words)
    assert compose._changed("config", words) is None


def test_one_that_is_changed_leaves_the_next_as_it_was():
    first = load_config("config", [])
    before = repr(first)
    first.trainer["max_steps"] = 7
    first.optim["betas"].append(0.5)
    first.optim["sched"]["warmup_steps"] = 9
    load_config("config", ["trainer.max_steps=8", "optim.sched.warmup_steps=1"])
    assert repr(load_config("config", [])) == before


def test_an_edited_file_is_read_again(tmp_path, monkeypatch):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(compose, "CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs" / "config.yaml"
    assert load_config("config", []).trainer["max_steps"] == 1000
    file.write_text(file.read_text().replace("max_steps: 1000", "max_steps: 77"))
    assert load_config("config", []).trainer["max_steps"] == 77
