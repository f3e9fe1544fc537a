"""Words of a user stay the words they typed."""

import re

import pytest

from nemo_minitron.config.compose import as_dict, from_dict, load_config


def composed(override):
    config = load_config("config", [override])
    value = config
    for part in override.split("=", 1)[0].split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    "word",
    ["1e-4", "true", "1_000", "1234e5", "./epoch=3-step=100", "./模型", "./ümlaut", "./a#b", "~/x",
     "it's", "a b", "a,b", "50%", "a{b}", "x(1)", "-3:-3"],
)  # fmt: skip
def test_a_text_is_what_was_typed(word):
    assert composed(f"workspace={word}") == word
    assert composed(f"source.model={word}") == word


def test_a_version_is_no_number():
    assert composed("export.tag=1.10") == "1.10"
    assert composed("source.revision=12e4567") == "12e4567"


def test_lists_of_texts_are_what_was_typed():
    assert composed("data.train.paths=[./a=b.txt, 1e-3,ü.txt]") == ["./a=b.txt", "1e-3", "ü.txt"]
    assert composed("distill.intermediate.layers=[1:2,-3:-3]") == ["1:2", "-3:-3"]


def test_hydras_own_grammar_still_means_what_it_means(monkeypatch):
    monkeypatch.setenv("PLACE", "/data")
    assert composed("workspace='./lr=1e-4'") == "./lr=1e-4"
    assert composed("workspace=a\\,b") == "a,b"
    assert composed("workspace=${oc.env:PLACE}/x") == "/data/x"
    assert composed("source.model=null") is None
    assert composed("data.train.paths=['./[x].txt', b]") == ["./[x].txt", "b"]
    assert composed("data.train.paths=[]") == []


@pytest.mark.parametrize(
    "override", ["workspace=", "workspace= ", "source.model=", "source.model=''"]
)
def test_an_unset_variable_is_refused(override):
    with pytest.raises(ValueError, match=r": empty \(an unset variable\?\)"):
        load_config("config", [override])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("plan.heads=16,8", "plan.heads: expected one value, found 16,8"),
        ("plan.heads=(", r"'plan.heads=\(': not an override of Hydra's grammar .* in quotes"),
        ("plan.hidden=a=b", "'plan.hidden=a=b': not an override"),
    ],
)
def test_what_cannot_be_read_is_named(override, line):
    with pytest.raises(ValueError, match=line):
        load_config("config", ["plan.ffn=8", override])


def test_a_text_that_yaml_would_change_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nexport:\n  tag: 1.10\n")
    with pytest.raises(
        ValueError, match=r"export.tag: YAML reads 1.10 as 1.1; write '1.10' in quotes"
    ):
        load_config("mine", [], str(tmp_path))
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nexport:\n  tag: '1.10'\n")
    assert load_config("mine", [], str(tmp_path)).export.tag == "1.10"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("plan=null", "plan: expected a section with keys of its own, as in plan.KEY=VALUE, found null"),
        ("trainer=null", "trainer: expected a section"),
        ("data.train=3", "data.train: expected a section with keys of its own, as in data.train.KEY=VALUE, found 3"),
        ("plan.budget.choices={ffn: 3}", "plan.budget.choices.ffn: expected a list"),
        ("+plan.budget.choices.ffn=[wide]", 'plan.budget.choices.ffn: expected a number, found "wide"'),
        ("plan.ffn=1.5", "plan.ffn: expected a whole number, found 1.5"),
        ("plan.serve=null", "plan.serve: expected a list"),
        ("evaluate.contexts=[5,a]", 'evaluate.contexts: expected a whole number, found "a"'),
        ("workspace=null", "workspace: expected a text, found null"),
        ("++score.seed=1e400", "score.seed: expected a whole number, found Infinity"),
        ("training.max_tokens=2e9", "training.max_tokens: expected a whole number, found 2000000000.0; write 2000000000"),
        ("training.ema_decay=x", 'training.ema_decay: expected a number, found "x"'),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_told_in_the_words_of_the_configuration(override, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        load_config("config", [override])


def test_parameters_of_another_type_are_told_by_key_and_whole_numbers_are_numbers():
    with pytest.raises(ValueError, match=r'^plan\.ffn: expected a whole number, found "x"$'):
        from_dict({"plan": {"ffn": "x"}})
    with pytest.raises(ValueError, match=r"^plan: expected a section .* found null$"):
        from_dict({"plan": None})
    values = as_dict(load_config("config", []))
    values["plan"]["budget"]["choices"] = {"ffn": [3, 0.5]}
    assert from_dict(values).plan.budget.choices == {"ffn": [3.0, 0.5]}
