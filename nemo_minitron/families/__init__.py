"""Floor 1: what a model family is. A family is a YAML table of named axes; there is no code per family."""

from nemo_minitron.families.family import (
    Axis,
    Family,
    Tap,
    TensorRow,
    axis_sizes,
    check_sizes,
    config_with_sizes,
    expected_tensors,
    families,
    family_of,
    find_row,
    load_family,
)
from nemo_minitron.families.grammar import evaluate, parse_row

__all__ = [
    "Axis",
    "Family",
    "Tap",
    "TensorRow",
    "axis_sizes",
    "check_sizes",
    "config_with_sizes",
    "evaluate",
    "expected_tensors",
    "families",
    "family_of",
    "find_row",
    "load_family",
    "parse_row",
]
