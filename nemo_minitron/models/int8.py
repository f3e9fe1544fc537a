"""torch: a frozen model's projections in eight bits, for a teacher that would not fit otherwise."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.families import Family, family_of
from nemo_minitron.models.causal_lm import layers_of, load_model


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale per output channel.

    w = s q with s = max |w| / 127 over a row. The product runs on q in the input's dtype (bfloat16
    holds every whole number up to 256) and is scaled afterwards, so that only the int8 weight lies
    in memory.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Quantises a layer.

        Args:
            linear: its weight is of shape [outputs, inputs].
        """
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = weight_OI.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("quantised_OI", (weight_OI / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O)
        self.bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        )
        self._dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix [outputs, inputs], which fused Mamba kernels read."""
        return (self.quantised_OI.float() * self.scale_O[:, None]).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if x.dtype == torch.float16:  # whose range sums of whole numbers leave
            product = nn.functional.linear(x, self.weight.to(x.dtype))
        else:
            product = nn.functional.linear(x, self.quantised_OI.to(x.dtype)) * self.scale_O.to(
                x.dtype
            )
        return product if self.bias is None else product + self.bias.to(x.dtype)


def load_teacher(folder: Path, dtype: str | None, device: torch.device | None = None) -> Any:
    """Loads a model to learn from.

    Args:
        folder: model folder.
        dtype: of its weights: a name of torch's, or ``int8`` (see ``Int8Linear``); None: as they
            are stored.
        device: where it goes; None: the CPU.

    Raises:
        ValueError: it does not load strictly.
    """
    if dtype != "int8":
        return load_model(folder, dtype or "auto", device)
    model = quantise(load_model(folder), family_of(read_config(folder)))
    return model.to(device or torch.device("cpu"))


def quantise(model: Any, family: Family) -> Any:
    """Puts ``Int8Linear`` in the place of the linear layers inside a model's layers; embedding and head stay.

    Experts that lie in one tensor stay too.
    """
    for layer in layers_of(model, family):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))
    return model
