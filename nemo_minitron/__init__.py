"""nemo_minitron: smaller language models out of bigger ones, by the Minitron recipe.

A name that ends in capitals is a tensor, and each capital one of its axes, as in ``hidden_TH``:

B samples of a batch; N samples of a set, in ``losses`` the tokens of a block of a chunk;
S positions of a sample; P positions of a prompt, in ``pruning`` those that stay;
T tokens (samples x positions); C tokens of a chunk;
H hidden channels, where there are two models the student's; G the teacher's, in ``pruning`` groups;
V entries of the vocabulary; W those of them that a shard holds; K those that are known or kept;
L layers; E experts; U units of an axis: channels, heads, neurons; R heads of a relation, D channels of one;
M texts of a mixture, in ``pruning`` terms of a sum;
O output and I input channels of a weight; 1 an axis kept after a sum.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "MinitronModel": "plugin.model",
    "Pruning": "plugin.transforms",
    "WidthPruning": "plugin.transforms",
    "DepthPruning": "plugin.transforms",
    "ModelTransform": "plugin.model_transform",
    "KnowledgeDistillation": "plugin.knowledge_distillation",
    "Student": "plugin.hooked_student",
    "LossWeights": "losses.fused_linear_loss",
    "Divergence": "losses.divergences",
}
"""What stays where it is between versions, by the module that holds it: docs/nemo.md."""
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Loads what is public when it is asked for: importing the package alone takes no time."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
