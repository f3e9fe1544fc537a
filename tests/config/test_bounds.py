"""Every number of the configuration has a range in which it means something, and is refused outside it."""

import copy
import functools
from ast import literal_eval
from typing import get_type_hints

import pytest

from nemo_minitron.config.bounds import HANDED_ON
from nemo_minitron.config.compose import as_dict, from_dict, load_config
from nemo_minitron.config.config import Config
from nemo_minitron.config.option import describe

NUMBERS = {
    name: item.metadata["bounds"]
    for name, item, section in describe(Config)
    if any(kind in str(get_type_hints(section)[item.name]) for kind in ("int", "float"))
}


def test_no_number_is_without_a_range():
    assert len(NUMBERS) > 60
    assert [name for name, bounds in NUMBERS.items() if not str(bounds)] == []


def outside(bounds):
    """Numbers just outside a range, as they are written, and what is expected of them."""
    if bounds.least is not None:
        yield f"{bounds.least - 1}", f"at least {bounds.least:,}"
    if bounds.above is not None:
        yield f"{bounds.above}", f"more than {bounds.above:,}"
    if bounds.most is not None:
        yield f"{bounds.most + 1}", f"at most {bounds.most:,}"
    if bounds.below is not None:
        yield f"{bounds.below}", f"less than {bounds.below:,}"


def override(name, value):
    kind = next(
        str(get_type_hints(section)[item.name])
        for other, item, section in describe(Config)
        if other == name
    )
    if "dict[str, list" in kind:
        return f"+{name}.hidden=[{value}]"
    if "dict" in kind:
        return f"+{name}.score={value}"
    return f"{name}=[{value}]" if "list" in kind else f"{name}={value}"


@pytest.fixture(scope="module")
def defaults():
    return as_dict(load_config("config", []))


def changed(values, override):
    """A configuration as the flows take it, with one key changed: composing each with Hydra takes five times as long."""
    name, _, value = override.partition("=")
    *sections, key = name.split(".")
    values = copy.deepcopy(values)
    functools.reduce(lambda section, part: section[part], sections, values)[key] = literal_eval(
        value
    )
    return values


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_its_range_is_refused_by_name(defaults, name):
    for value, expected in outside(NUMBERS[name]):
        with pytest.raises(ValueError, match=rf"^{name}[.\w]*: expected {expected}, found"):
            given = override(name, value)
            if given.startswith("+"):
                load_config("config", [given])
            from_dict(changed(defaults, given))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["distill.kl", "launch.wait", "data.train.weights"])
def test_what_is_no_finite_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 0, found -?(nan|inf)"):
        load_config("config", [override(name, value)])


@pytest.mark.parametrize("name", HANDED_ON)
def test_numbers_that_lightning_and_nemo_would_break_on_are_refused_by_name(defaults, name):
    for value, expected in outside(HANDED_ON[name]):
        given = f"[{value},0.5]" if name.endswith("betas") else value
        with pytest.raises(ValueError, match=f"^{name}: expected {expected}, found"):
            from_dict(changed(defaults, f"{name}={given}"))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "trainer.accumulate_grad_batches=0",
            "trainer.accumulate_grad_batches: expected at least 1",
        ),
        (
            "trainer.val_check_interval=0",
            "trainer.val_check_interval: expected more than 0, found 0",
        ),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps: expected at least 1, found 0"),
        ("score.batch_size=-1", "score.batch_size: expected at least "),
        ("distill.batch_size=100000", "distill.batch_size: expected at most 16,384, found 100000"),
        ("++trainer.max_steps=-2", "trainer.max_steps: expected at least "),
        ("optim.lr=abc", "optim.lr: expected a number, found 'abc'"),
        ("optim.lr=[0.1]", r"optim.lr: expected a number, found \[0.1\]"),
        ("optim.lr=nan", "optim.lr: expected a finite number, found nan"),
        ("+optim.sched.other=inf", "optim.sched.other: expected a finite number, found inf"),
        ("optim.betas=[0.9]", r"optim.betas: expected two numbers, found \[0.9\]"),
        ("optim.betas=0.9", "optim.betas: expected two numbers, found 0.9"),
        ("optim.betas=[a,b]", r"optim.betas: expected two numbers, found \['a', 'b'\]"),
        ("trainer.max_steps={a:1}", "trainer.max_steps: expected a number, found {'a': 1}"),
        ("+optim.sched.warmup_ratio=0.1", r"'~optim.sched.warmup_steps'"),
        ("optim.sched=null", "'~optim.sched' removes it"),
        ("optim.name=admw", "optim.name: expected one of sgd, adam, .*, found 'admw'"),
        ("optim.sched.name=cosine", "optim.sched.name: expected one of Warmup.*, found 'cosine'"),
        ("+correct.optim.name=Adam", "correct.optim.name: expected one of sgd, .*, found 'Adam'"),
        ("training.ema_decay=2", "training.ema_decay: expected less than 1, found 2.0"),
    ],
)
def test_what_would_fail_deep_inside_a_training_is_refused_at_once(override, line):
    with pytest.raises(ValueError, match=line):
        load_config("config", [override])


def test_a_schedule_may_be_removed():
    assert "sched" not in load_config("config", ["~optim.sched"]).optim
