"""What a library says of a config.json, in words that its reader knows."""

from nemo_minitron.models.config_trial import reason


def test_types_are_named_as_in_json():
    error = TypeError(
        "Validation error: TypeError: a bool matches none of (<class 'int'>, <class 'NoneType'>)"
    )
    assert reason(error) == "Validation error: a bool matches none of (int, null)"


def test_a_value_that_does_not_fit_is_told_without_pythons_words():
    said = reason(AttributeError("'int' object has no attribute 'is_floating_point'"))
    assert said == "a value of type int does not fit"


def test_a_name_that_a_module_does_not_have_is_told_without_pythons_words():
    for name in ("nope", "", "a b"):
        said = reason(AttributeError(f"module 'torch' has no attribute '{name}'"))
        assert said == f"torch has no '{name}'"
