"""Numbers that the host reads when the accelerator has them, without waiting for it in between.

A host that waits for a number lets the accelerator run dry: nothing is queued behind it meanwhile.
"""

import torch
from torch import Tensor


class LateRead:
    """A copy of some numbers on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        """Starts the copy.

        Args:
            values: Tensor of shape [numbers].
        """
        self._done: torch.cuda.Event | None = None
        if (
            values.device.type == "cuda"
        ):  # only from pinned memory on does a copy run beside the host
            self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._copy.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:  # Metal writes such a copy after it has said that it is there
            self._copy = values.to("cpu", non_blocking=values.device.type != "mps")

    def values(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        found: list[float] = self._copy.tolist()
        return found
