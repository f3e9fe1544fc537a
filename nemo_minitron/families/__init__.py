"""What a model family is. A family is a YAML table of named axes; there is no code per family."""

from nemo_minitron.families.architecture import (
    axis_sizes,
    check_layers,
    check_sizes,
    config_values,
    config_with_sizes,
    expected_tensors,
    family_of,
    fill,
    find_row,
    has_tensor,
    present_axes,
    tensor_names,
)
from nemo_minitron.families.grammar import evaluate, parse_row
from nemo_minitron.families.table import (
    Axis,
    Family,
    Fold,
    Tap,
    TensorRow,
    families,
    load_family,
    own_tables,
    use_tables,
)

__all__ = [
    "Axis",
    "Family",
    "Fold",
    "Tap",
    "TensorRow",
    "axis_sizes",
    "check_layers",
    "check_sizes",
    "config_values",
    "config_with_sizes",
    "evaluate",
    "expected_tensors",
    "families",
    "family_of",
    "fill",
    "find_row",
    "has_tensor",
    "load_family",
    "own_tables",
    "parse_row",
    "present_axes",
    "tensor_names",
    "use_tables",
]
