import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.families import architecture_of, families
from nemo_minitron.families.grammar import evaluate, names_in, parse_row, row_axes, row_shape
from nemo_minitron.proofs.tiny_models import tiny_config
from nemo_minitron.pruning.slice import Cut, cut_config


def test_the_three_operators():
    row = parse_row("(heads head_dim | kv_heads head_dim | kv_heads head_dim) hidden")
    assert row == (
        (("heads", "head_dim"), ("kv_heads", "head_dim"), ("kv_heads", "head_dim")),
        (("hidden",),),
    )
    assert row_axes(row) == {"heads", "head_dim", "kv_heads", "hidden"}
    assert row_shape(row, {"heads": 6, "kv_heads": 2, "head_dim": 4, "hidden": 5}) == (40, 5)


@pytest.mark.parametrize("text", ["", "(", ")", "a |", "(a | )", "()", "((a) b)", "a $ b", "(a b"])
def test_what_is_not_a_row_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match="row"):
        parse_row(text)


@given(st.lists(st.lists(st.lists(st.sampled_from("abcde"), min_size=1), min_size=1), min_size=1))
def test_a_printed_row_parses_back(dims):
    text = " ".join("(" + " | ".join(" ".join(product) for product in dim) + ")" for dim in dims)
    assert parse_row(text) == tuple(tuple(tuple(product) for product in dim) for dim in dims)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("hidden / heads", 128),
        ("heads % kv == 0", True),
        ("not tied", False),
        ("tied and hidden > 1", True),
        ("hidden // 5 + 2 * kv", 835),
        ("hidden ** 0.5", 64.0),
        ("tied or hidden", True),
        ("missing or blocks", ["a", "b"]),
        ("len(missing or blocks)", 2),
        ("blocks[1] in ['b', 'c'] and kv not in [1]", True),
        ("'x' if blocks[0] == 'b' else -kv", -8),
    ],
)
def test_expressions(expression, expected):
    assert (
        evaluate(
            expression,
            {
                "hidden": 4096,
                "heads": 32,
                "kv": 8,
                "tied": True,
                "missing": None,
                "blocks": ["a", "b"],
            },
        )
        == expected
    )


@pytest.mark.parametrize("text", ["__import__('os')", "a.b", "{1: 2}", "f(x)", "lambda: 1", "a <"])
def test_expressions_run_nothing(text):
    with pytest.raises(ValueError, match="expression"):
        evaluate(text, {"a": 1})


@pytest.mark.parametrize(
    "text", ["a / 0", "a + 'x'", "a[0]", "'abc'[5]", "len(a)", "10 ** 400 / 3"]
)
def test_what_cannot_be_computed_is_a_clear_error(text):
    with pytest.raises(ValueError, match=r"cannot be computed with (a=1)?$"):
        evaluate(text, {"a": 1, "b": 2})


def test_a_models_expression_that_cannot_be_computed_names_its_config():
    config = {**tiny_config(families()["smollm3"], {}), "no_rope_layer_interval": [4]}
    with pytest.raises(ValueError, match=r"^there/config.json: .* no_rope_layer_interval=\[4\]$"):
        cut_config(Cut(architecture_of(config, "there/config.json"), {}, (0, 2)))


def test_numbers_are_dimensions_of_their_own():
    assert row_shape(parse_row("1 (ffn 2) kernel"), {"ffn": 5, "kernel": 4}) == (1, 10, 4)
    assert row_axes(parse_row("1 (ffn 2)")) == {"ffn"}


def test_a_scalar_has_no_dimension():
    assert parse_row("scalar") == ()
    assert row_shape(parse_row("scalar"), {}) == ()
    with pytest.raises(ValueError, match="row is empty"):
        parse_row(" ")


def test_a_name_without_value_is_named():
    with pytest.raises(ValueError, match="'heads' has no value"):
        evaluate("hidden / heads", {"hidden": 1})
    assert names_in("hidden / heads") == {"hidden", "heads"}
