"""A Lightning callback that applies a module's ``model_transform``, before the optimiser is made."""

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from nemo_minitron.plugin.speech_models import is_speech_model
from nemo_minitron.plugin.transforms import Pruning, hugging_face_models


class ModelTransform(Callback):
    """Applies ``pl_module.model_transform`` once, before the optimiser is made.

    The transform may change the module in place, return another one, or both. NeMo 2.x has a callback
    of the same name, which applies transforms after the optimiser was made: an optimiser would then
    hold parameters that a transform has replaced, and train nothing. This one refuses to.

    Attributes:
        at: name of the module's attribute that is transformed, such as ``llm``; None: the one that
            holds the Hugging Face model, else ``model``.
    """

    def __init__(self, at: str | None = None) -> None:
        self.at, self.applied = at, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Applies the transform.

        Raises:
            ValueError: several attributes hold a Hugging Face model and none is named, or there is
                nothing to transform; see also the transform.
        """
        transform: Callable[[nn.Module], nn.Module | None] | None = getattr(
            pl_module, "model_transform", None
        )
        if transform is None or self.applied:
            return
        if self.at is None and isinstance(transform, Pruning) and is_speech_model(pl_module):
            transform(pl_module)  # what lies around the LM is cut, too
            self.applied = True
            return
        name = self._name(pl_module)
        result = transform(getattr(pl_module, name))
        if result is not None:
            setattr(pl_module, name, result)
        self.applied = True

    def _name(self, pl_module: LightningModule) -> str:
        holder = type(pl_module).__name__
        if self.at is not None:
            if not isinstance(getattr(pl_module, self.at, None), nn.Module):
                raise ValueError(f"ModelTransform: {holder} has no module {self.at!r}")
            return self.at
        found = [name for name, child in pl_module.named_children() if hugging_face_models(child)]
        if len(found) > 1:
            raise ValueError(
                f"ModelTransform: {holder} holds Hugging Face models in {', '.join(found)}; say which "
                f"one, as in ModelTransform(at={found[0]!r})"
            )
        if not found and not isinstance(getattr(pl_module, "model", None), nn.Module):
            raise ValueError(
                f"ModelTransform: {holder} holds no Hugging Face model; say what to transform, as in "
                "ModelTransform(at='decoder')"
            )
        return found[0] if found else "model"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks whether what is trained is what was transformed.

        Raises:
            ValueError: the optimiser holds none of the module's parameters.
        """
        ours = {id(p) for p in pl_module.parameters() if p.requires_grad}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        plain = type(trainer.strategy).__name__ in ("SingleDeviceStrategy", "DDPStrategy")
        if self.applied and plain and groups and not ours & held:
            raise ValueError(
                f"ModelTransform: the optimiser holds none of the parameters of {type(pl_module).__name__}: "
                "it was made before the transform, and would train nothing; make it in configure_optimizers"
            )
