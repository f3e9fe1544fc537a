"""Weights of a frozen model as autocast would round them in every pass."""

from typing import Any

import torch
from torch import nn

from nemo_minitron.families import Family
from nemo_minitron.models.causal_lm import layers_of


def round_products(model: Any, family: Family, dtype: torch.dtype) -> None:
    """Rounds the weights of the linear layers, once: under autocast the results stay what they were.

    Autocast keeps what it has rounded only of weights that are trained. Embedding, norms and head keep
    their dtype, and with them the states between the layers.

    Args:
        model: a frozen Hugging Face causal LM.
        family: its family.
        dtype: that of autocast.
    """
    for layer in layers_of(model, family):
        for module in layer.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.float32:
                module.weight.data = module.weight.data.to(dtype)
