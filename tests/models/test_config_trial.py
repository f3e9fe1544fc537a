"""What a library says of a config.json, in words that its reader knows."""

from nemo_minitron.models.config_trial import reason


def test_types_are_named_as_in_json():
    error = TypeError(
        "Validation error: TypeError: a bool matches none of (<class 'int'>, <class 'NoneType'>)"
    )
    assert reason(error) == "Validation error: a bool matches none of (int, null)"
