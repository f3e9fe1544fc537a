"""What a model family is. A family is a YAML table of named axes; there is no code per family."""

from nemo_minitron.families.architecture import (
    Architecture,
    architecture_of,
    check_sizes,
    family_for,
    family_of,
    fill,
    find_row,
    predicts,
)
from nemo_minitron.families.family import (
    CHOSEN_EXPERTS,
    VOCAB,
    Axis,
    Family,
    Fold,
    Tap,
    TensorRow,
)
from nemo_minitron.families.grammar import evaluate, parse_row
from nemo_minitron.families.prediction_layers import (
    PredictionLayers,
    layers_behind,
    prediction_layers,
)
from nemo_minitron.families.table import families, load_family, own_tables, use_tables
from nemo_minitron.families.wrapper import (
    Wrapper,
    text_config,
    with_text,
    wrapper_of,
    wrappers,
)

__all__ = [
    "CHOSEN_EXPERTS",
    "VOCAB",
    "Architecture",
    "Axis",
    "Family",
    "Fold",
    "PredictionLayers",
    "Tap",
    "TensorRow",
    "Wrapper",
    "architecture_of",
    "check_sizes",
    "evaluate",
    "families",
    "family_for",
    "family_of",
    "fill",
    "find_row",
    "layers_behind",
    "load_family",
    "own_tables",
    "parse_row",
    "prediction_layers",
    "predicts",
    "text_config",
    "use_tables",
    "with_text",
    "wrapper_of",
    "wrappers",
]
