"""The part of ``MinitronModel`` that clips gradients, by a norm that is measured once."""

from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision

from nemo_minitron.training.loss_guard import gradient_norm, gradients_of, guards, weights_of


class Clipping:
    """To be inherited from before ``ModelPT``."""

    _trainer: Any
    _sharded: bool
    clip_gradients: Any

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips by the norm over all ranks' parts; by value as Lightning does.

        The norm is measured once: the guards of the training judge the step by it too.
        """
        watching, precision = guards(self._trainer), self._trainer.precision_plugin
        # under float16 gradients may be infinite, and an optimiser may unscale them by itself
        scaled = precision.precision in ("16-mixed", "16-true")
        by_norm = str(gradient_clip_algorithm or "norm") == "norm" and (gradient_clip_val or 0) > 0
        if not self._sharded:  # some strategies of Lightning's have a norm of their own
            own = type(precision).clip_grad_by_norm is not Precision.clip_grad_by_norm
            by_norm = by_norm and not (scaled or own)
        norm = None
        if by_norm or (watching and not scaled):
            norm = gradient_norm(gradients_of(optimizer))
        for guard in watching:
            guard.judge_gradients(None if scaled else norm)
        if by_norm:
            torch.nn.utils.clip_grads_with_norm_(
                weights_of(optimizer), gradient_clip_val, norm, False if self._sharded else None
            )
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
