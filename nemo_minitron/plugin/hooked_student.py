"""A user's own module as a student: hidden states, labels and masks are taken by hooks."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from nemo_minitron.families import family_of
from nemo_minitron.losses.fused_linear_loss import LossResult
from nemo_minitron.models.causal_lm import decoder_of, divided, projection_of
from nemo_minitron.plugin.speech_models import check_taught, is_speech_model
from nemo_minitron.plugin.step_log import log_step
from nemo_minitron.plugin.transforms import causal_lm_in
from nemo_minitron.training.batches import IGNORED, as_batch

_WHERE = "KnowledgeDistillation"
_READ = ("input_ids", "attention_mask", "position_ids", "labels")
"""Arguments of the student's forward pass that the teacher, or the loss, needs too."""
_STEPS = {"val": "validation_step", "test": "test_step"}
"""What a measuring step logs is named after, and how it is called."""


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
    ``kd_loss`` and the like. A ``validation_step`` or ``test_step`` that runs the model once is left
    as it is, and the divergence of its tokens is logged as ``val_divergence`` or ``test_divergence``,
    as ``MinitronModel`` does. ``release`` takes all of it back.

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
            ValueError: no single model can be found in it, or its family is not supported.
        """
        try:
            self.model = causal_lm_in(pl_module, settings.at)
        except ValueError as error:
            raise ValueError(f"{_WHERE}: {error}") from error
        self.family = family_of(self.model.config.to_dict(), type(self.model).__name__)
        self._speech = settings.at is None and is_speech_model(pl_module)
        if self._speech:
            check_taught(pl_module)
        self._module, self._objective, self._settings = pl_module, objective, settings
        self._inputs: list[dict[str, Any]] = []
        self._hidden: list[Tensor] = []
        self._handles = [
            self.model.register_forward_pre_hook(self._note_inputs, with_kwargs=True),
            decoder_of(self.model, self.family).register_forward_hook(self._note_hidden),
        ]
        self._listens, self._warned = False, False
        self._own: dict[str, Any] = {}
        self._prepared: Mapping[str, Any] = {}
        self._batch: Any = None
        if self._speech:
            self._wrap("prepare_inputs", self._note_prepared)
        self._wrap("training_step", self._training_step)
        for kind, name in _STEPS.items():
            if is_overridden(name, pl_module):
                self._wrap(name, functools.partial(self._measuring_step, kind))

    def _wrap(self, name: str, step: Callable[..., Any]) -> None:
        """Puts a step in the place of the module's, which gets that one and its arguments.

        A step that another one calls (``validation_step`` its ``training_step``) is that one's part.
        """
        own = getattr(self._module, name)
        self._own[name] = self._module.__dict__.get(name)

        @functools.wraps(own)  # Lightning looks which arguments a step takes
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            inside = self._listens and name in ("training_step", *_STEPS.values())
            return own(*args, **kwargs) if inside else step(own, *args, **kwargs)

        if not inspect.ismethod(own):  # of which Lightning counts the first argument as self
            del wrapped.__wrapped__
        setattr(self._module, name, wrapped)

    def release(self) -> None:
        """Takes the hooks away, and gives the module its steps back."""
        for handle in self._handles:
            handle.remove()
        for name, own in self._own.items():
            if own is None:
                self._module.__dict__.pop(name, None)
            else:
                setattr(self._module, name, own)

    def _note_inputs(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._listens:  # of a pass outside of a step nothing is kept
            return
        given = dict(zip(_READ, args, strict=False)) if len(args) <= 3 else {}
        found = {name: kwargs.get(name, given.get(name)) for name in _READ}
        self._inputs.append({name: value for name, value in found.items() if value is not None})

    def _note_hidden(self, _: Any, args: Any, output: Any) -> None:
        if not self._listens:
            return
        self._hidden.append(
            output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        )

    def _note_prepared(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a speech model gives its LM, with the labels of its positions."""
        self._batch = kwargs["batch"] if "batch" in kwargs else args[0]
        self._prepared = own(*args, **kwargs)
        return self._prepared

    def _heard(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A step's own result; what it gives the model is noted."""
        self._inputs, self._hidden, self._listens = [], [], True
        try:
            return step(*args, **kwargs)
        finally:
            self._listens = False

    def _training_step(self, own: Callable[..., Any], batch: Any, *more: Any, **named: Any) -> Any:
        result = self._heard(own, batch, *more, **named)
        terms, _ = self._terms(batch, "training_step")
        logged = {f"kd_{name}": value for name, value in terms.named().items()}
        log_step(self._module, logged, batch_size=1)
        loss = terms.loss
        if self._settings.loss == "add":
            loss = loss + (result["loss"] if isinstance(result, Mapping) else result)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _measuring_step(
        self, kind: str, own: Callable[..., Any], batch: Any, *more: Any, **named: Any
    ) -> Any:
        """The same of a validation, whose result and log stay the module's."""
        result = self._heard(own, batch, *more, **named)
        heard = len(self._inputs) == 1 == len(self._hidden)
        if not heard or not (self._speech or "input_ids" in self._inputs[0]):
            if not self._warned:
                rank_zero_warn(
                    f"{_WHERE}: the {_STEPS[kind]} of {type(self._module).__name__} does not run its "
                    f"{type(self.model).__name__} once with input_ids: no divergence is logged there"
                )
            self._warned, self._inputs, self._hidden = True, [], []
            return result
        terms, learned = self._terms(batch, _STEPS[kind])
        number = named.get("dataloader_idx", more[1] if len(more) > 1 else 0)
        self._module.log(
            f"{number}_{kind}_divergence" if number else f"{kind}_divergence", terms.divergence,
            on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False, batch_size=learned,
        )  # fmt: skip
        return result

    def _terms(self, batch: Any, name: str) -> tuple[LossResult, int]:
        """The objective of what was heard, and how many tokens are learned there."""
        step = f"the {name} of {type(self._module).__name__}"
        if len(self._inputs) != 1 or len(self._hidden) != 1:
            raise ValueError(
                f"{_WHERE}: {step} ran its {type(self.model).__name__} {len(self._inputs)} times, "
                "expected once"
            )
        (inputs,), (hidden_BSH,) = self._inputs, self._hidden
        self._inputs, self._hidden = [], []
        if self._speech:
            return self._speech_terms(hidden_BSH)
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
        labels_T = given.labels_BS.flatten()
        terms = self._objective(student, labels_T, given.tokens_BS, None, **given.more)
        return terms, int((labels_T >= 0).sum()) if name in _STEPS.values() else 0

    def _speech_terms(self, hidden_BSH: Tensor) -> tuple[LossResult, int]:
        """The same of a speech model, whose labels stand at the positions that predict them."""
        labels_T = self._prepared["target_ids"].flatten()
        hidden_TH = divided(self.model, self.family, hidden_BSH).flatten(0, 1)
        student = projection_of(self.model, self.family, hidden_TH)
        terms = self._objective(student, labels_T, None, None, batch=self._batch)
        return terms, int((labels_T >= 0).sum())


def _longer(name: str, value_BS: Tensor) -> Tensor:
    added_B1 = torch.full_like(value_BS[:, :1], IGNORED if name == "labels" else 0)
    return torch.cat([value_BS, added_B1], 1)
