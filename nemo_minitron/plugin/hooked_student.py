"""A user's own module as a student: hidden states, labels and masks are taken by hooks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from nemo_minitron.families import family_of
from nemo_minitron.losses.fused_linear_loss import LossResult
from nemo_minitron.models.causal_lm import decoder_of, divided, projection_of
from nemo_minitron.plugin.transforms import causal_lm_in
from nemo_minitron.training.batches import IGNORED, as_batch

_WHERE = "KnowledgeDistillation"
_READ = ("input_ids", "attention_mask", "position_ids", "labels")
"""Arguments of the student's forward pass that the teacher, or the loss, needs too."""


@dataclass(frozen=True)
class Student:
    """How a module that is no ``MinitronModel`` is distilled.

    Attributes:
        at: path of the Hugging Face model that is trained; None: the only one in the module.
        loss: whether the step's own loss is to be replaced (``replace``), or counts, too (``add``).
        labels: key of the batch that holds the labels (-100: not learned), where the model is run
            without them.
    """

    at: str | None = None
    loss: str = "replace"
    labels: str = "labels"

    def __post_init__(self) -> None:
        """Refuses an unknown choice.

        Raises:
            ValueError: it is one.
        """
        if self.loss not in ("replace", "add"):
            raise ValueError(f"loss: expected replace or add, found {self.loss!r}")


class HookedStudent:
    """The Hugging Face model in a LightningModule whose ``training_step`` runs it once.

    The step's loss is replaced by the objective's, or that is added to it; the terms are logged as
    ``kd_loss`` and the like. ``release`` takes all of it back.

    Attributes:
        model: the student.
        family: its family.
    """

    def __init__(
        self,
        pl_module: LightningModule,
        settings: Student,
        objective: Callable[..., LossResult],
    ) -> None:
        """Hooks the model and wraps the step.

        Args:
            pl_module: the module.
            settings: which model in it, and what becomes of its loss.
            objective: see ``plugin.model.Objective``.

        Raises:
            ValueError: which model is meant cannot be told, or its family is not supported.
        """
        try:
            self.model = causal_lm_in(pl_module, settings.at)
        except ValueError as error:
            raise ValueError(f"{_WHERE}: {error}") from error
        self.family = family_of(self.model.config.to_dict(), type(self.model).__name__)
        self._module, self._objective, self._settings = pl_module, objective, settings
        self._inputs: list[dict[str, Any]] = []
        self._hidden: list[Tensor] = []
        self._handles = [
            self.model.register_forward_pre_hook(self._note_inputs, with_kwargs=True),
            decoder_of(self.model, self.family).register_forward_hook(self._note_hidden),
        ]
        self._own = pl_module.__dict__.get("training_step")
        self._step = pl_module.training_step
        pl_module.training_step = self._training_step  # type: ignore[method-assign]

    def release(self) -> None:
        """Takes the hooks away, and gives the module its step back."""
        for handle in self._handles:
            handle.remove()
        if self._own is None:
            self._module.__dict__.pop("training_step", None)
        else:
            self._module.training_step = self._own  # type: ignore[method-assign]

    def _note_inputs(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(_READ, args, strict=False)) if len(args) <= 3 else {}
        found = {name: kwargs.get(name, given.get(name)) for name in _READ}
        self._inputs.append({name: value for name, value in found.items() if value is not None})

    def _note_hidden(self, _: Any, args: Any, output: Any) -> None:
        self._hidden.append(
            output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        )

    def _training_step(self, batch: Any, *more: Any) -> Any:
        self._inputs, self._hidden = [], []
        result = self._step(batch, *more)
        terms = self._terms(batch)
        named = {f"kd_{name}": value for name, value in terms.named().items()}
        self._module.log_dict(named, batch_size=1)
        loss = terms.loss
        if self._settings.loss == "add":
            loss = loss + (result["loss"] if isinstance(result, Mapping) else result)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _terms(self, batch: Any) -> LossResult:
        step = f"the training_step of {type(self._module).__name__}"
        if len(self._inputs) != 1 or len(self._hidden) != 1:
            raise ValueError(
                f"{_WHERE}: {step} ran its {type(self.model).__name__} {len(self._inputs)} times, "
                "expected once"
            )
        (inputs,), (hidden_BSH,) = self._inputs, self._hidden
        self._inputs, self._hidden = [], []
        if "input_ids" not in inputs:
            raise ValueError(
                f"{_WHERE}: {step} gives its {type(self.model).__name__} no input_ids; the teacher has to "
                "read the same tokens"
            )
        key = self._settings.labels
        if "labels" not in inputs and isinstance(batch, Mapping) and key in batch:
            inputs["labels"] = batch[key]
        inputs.setdefault("labels", inputs["input_ids"])
        # a position more, which is not learned: the teacher then reads all that the student has read
        given = as_batch({name: _longer(name, value) for name, value in inputs.items()})
        hidden_TH = divided(self.model, self.family, hidden_BSH).flatten(0, 1)
        student = projection_of(self.model, self.family, hidden_TH)
        return self._objective(
            student, given.labels_BS.flatten(), given.tokens_BS, None, **given.more
        )


def _longer(name: str, value_BS: Tensor) -> Tensor:
    added_B1 = torch.full_like(value_BS[:, :1], IGNORED if name == "labels" else 0)
    return torch.cat([value_BS, added_B1], 1)
