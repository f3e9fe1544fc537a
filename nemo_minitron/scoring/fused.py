"""Which activations are summed by kernels that read them once."""

import functools
import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Kernels(Protocol):
    """What ``triton_kernels`` offers."""

    def sequence_sums(
        self, x_BSU: Tensor, mask_BS: Tensor | None, hows: Sequence[str]
    ) -> dict[str, Tensor]:
        """Sums that ``importance.finished`` ends."""

    def cosines(self, before_BSH: Tensor, after_BSH: Tensor) -> Tensor:
        """As ``depth.cosines``."""


def kernels_for(tensor: Tensor) -> Kernels | None:
    """Kernels for a tensor on CUDA; None: PyTorch's operations, one after the other."""
    if tensor.device.type != "cuda" or tensor.dtype not in _DTYPES:
        return None
    return _kernels(tensor.device)


@functools.cache
def _kernels(device: torch.device) -> Kernels | None:
    """The kernels, tried once on a device: a driver or compiler that lacks something must not end a run."""
    try:
        from nemo_minitron.scoring import triton_kernels

        x_BSU = torch.ones(1, 2, 4, device=device, dtype=torch.bfloat16)
        triton_kernels.sequence_sums(x_BSU, None, ("mean",))
        triton_kernels.cosines(x_BSU, x_BSU)
    except Exception as error:  # whatever Triton and its compiler raise
        said = next(iter(str(error).splitlines()), "")[:200]
        print(
            f"score: without Triton's kernels, slower ({type(error).__name__}: {said})",
            file=sys.stderr,
            flush=True,
        )
        return None
    return triton_kernels
