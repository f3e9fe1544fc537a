"""torch: a frozen model's projections in eight bits, for a teacher that would not fit otherwise."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.families import Family, family_of
from nemo_minitron.models.causal_lm import layers_of, load_model, pick_device
from nemo_minitron.models.fp8 import KEY, MULTIPLE, check_device, fp8_layers


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale per output channel.

    w = s q with s = max |w| / 127 over a row. The product runs on q in the input's dtype, or autocast's
    (bfloat16 holds every whole number up to 256), and is scaled afterwards, so that only the int8
    weight lies in memory; in float16, whose range it might leave, it runs on w. It saves memory, and
    costs time: the weight is converted for every product.
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
        place, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(place):
            dtype = torch.get_autocast_dtype(place)
        if dtype == torch.float16:  # whose range sums of whole numbers leave
            product = nn.functional.linear(x, self.weight.to(dtype))
        else:
            product = nn.functional.linear(x, self.quantised_OI.to(x.dtype)) * self.scale_O.to(
                x.dtype
            )
        return product if self.bias is None else product + self.bias.to(product.dtype)


def load_teacher(folder: Path, dtype: str | None, device: torch.device | None = None) -> Any:
    """Loads a model to learn from.

    Args:
        folder: model folder.
        dtype: of its weights: a name of torch's, ``int8`` (see ``Int8Linear``) or ``fp8`` (see
            ``Fp8Linear``; all else is bfloat16); None: as they are stored.
        device: where it goes; None: the CPU.

    Raises:
        ValueError: it does not load strictly, or the device has no product in fp8.
    """
    if dtype == "fp8":
        check_device(device or torch.device("cpu"))
        model = load_model(folder, "bfloat16")
    elif dtype == "int8":
        model = load_model(folder)
    else:
        return load_model(folder, dtype or "auto", device)
    model = quantise(model, family_of(read_config(folder)), dtype)
    return model.to(device or torch.device("cpu"))


def quantise(model: Any, family: Family, dtype: str = "int8") -> Any:
    """Puts layers of eight bits in the place of the linear layers inside a model's layers.

    One after the other, so that there is never a second copy. Embedding and head stay, and so do
    experts that lie in one tensor, and under fp8 layers of sizes that it does not take.

    Args:
        model: a causal LM.
        family: its table.
        dtype: ``int8`` or ``fp8``.
    """
    for layer in layers_of(model, family):
        for parent in list(layer.modules()):
            linears = _linears(parent)
            new = fp8_layers if dtype == "fp8" else _int8_layers
            for name, child in zip(linears, new(list(linears.values())), strict=True):
                setattr(parent, name, child)
    return model


def check_teacher(dtype: str | None, accelerator: str) -> None:
    """Refuses a dtype of a teacher that the device of a training has no product for, before it loads.

    Args:
        dtype: see ``load_teacher``.
        accelerator: ``trainer.accelerator``.

    Raises:
        ValueError: it has none.
    """
    if dtype == "fp8":
        check_device(pick_device("cpu" if accelerator == "cpu" else "auto"))


def left_out(model: Any, family: Family) -> str | None:
    """Says of a model in fp8 how many linear layers inside its layers are not; None: they all are."""
    modules = [module for layer in layers_of(model, family) for module in layer.modules()]
    count = sum(len(_linears(module)) for module in modules)
    if count == 0:
        return None
    what = f"{count} linear layers stay" if count > 1 else "one linear layer stays"
    return f"{KEY}: {what} in bfloat16: no multiples of {MULTIPLE} wide"


def _linears(parent: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in parent.named_children() if type(child) is nn.Linear}


def _int8_layers(linears: list[nn.Linear]) -> list[nn.Module]:
    return [Int8Linear(linear) for linear in linears]
