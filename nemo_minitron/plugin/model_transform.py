"""A Lightning callback that applies a module's ``model_transform``; NeMo 2.x's own where it is there."""

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

try:  # NeMo 2.x has its own; it calls pl_module.model_transform(trainer.model) and ignores what comes back
    from nemo.lightning.pytorch.callbacks import ModelTransform
except ImportError:

    class ModelTransform(Callback):  # type: ignore[no-redef]
        """Applies ``pl_module.model_transform`` once, before the optimiser is made.

        The transform may change the module in place, return another one, or both.
        """

        def __init__(self) -> None:
            self.applied = False

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            """Applies the transform to the module's ``model``."""
            transform: Callable[[nn.Module], nn.Module] | None = getattr(
                pl_module, "model_transform", None
            )
            if transform is None or self.applied:
                return
            self.applied = True
            result = transform(pl_module.model)
            if result is not None:
                pl_module.model = result
