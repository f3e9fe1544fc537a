"""The callback that distils from a teacher's logits and, where configured, its hidden states."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from nemo_minitron.distillation.intermediate_loss import IntermediateLoss
from nemo_minitron.distillation.parallel_loss import linear_loss
from nemo_minitron.distillation.teacher_logits import TeacherLogits
from nemo_minitron.families import Family, family_of
from nemo_minitron.losses import kept_entries
from nemo_minitron.losses.fused_linear_loss import (
    LossResult,
    LossWeights,
    cross_entropy,
    fused_linear_loss,
)
from nemo_minitron.losses.intermediate import IntermediateWeights, balance
from nemo_minitron.losses.kept_entries import Entries, KeptEntries
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.autocast_weights import round_products
from nemo_minitron.models.causal_lm import head_of, hidden_states, load_model, softcap_of, untracked
from nemo_minitron.models.offload import Offloaded
from nemo_minitron.plugin.hooked_student import HookedStudent, Student
from nemo_minitron.plugin.model import MinitronModel, Objective
from nemo_minitron.plugin.model_transform import ModelTransform
from nemo_minitron.plugin.speech_models import SpeechTeacher, is_speech_model
from nemo_minitron.training.compilation import Compiled
from nemo_minitron.training.strategies import shard
from nemo_minitron.training.transformer_engine import LayerReplacement

_PRODUCTS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precisions of Lightning's Trainer, and the dtype that autocast rounds the operands of products to."""


class KnowledgeDistillation(Callback):
    """Trains a model against a frozen teacher by logits ([P1] section 3).

    The student is a ``MinitronModel``, or the Hugging Face model in any LightningModule whose
    ``training_step`` runs it once, with ``input_ids``. The teacher is no part of the trained module:
    it is in no checkpoint and no optimiser. Where there is a ``ModelTransform``, it is applied first,
    in whatever order the callbacks stand. When the trainer is done, the module's own loss is back.

    Attributes:
        teacher: a Hugging Face causal LM; its vocabulary is the student's.
        family: the teacher's family.
        weights: the mix of the losses.
        chunk_tokens: tokens whose logits exist at a time, or None.
        vocabulary: entries that count, where the models' vocabularies are padded to different
            sizes; of a student whose vocabulary was cut, which of the teacher's it has; None: all.
        intermediate: losses on hidden states besides; None: none.
        kept_H: see ``IntermediateLoss``.
        place: where the teacher runs: the student's ``device``, ``shard`` (split over ranks),
            ``offload`` (on the device, from the machine's memory: ``models/offload.py``), or ``cpu``.
        teacher_loss: its cross-entropy on the validation samples, once it has been measured.
    """

    def __init__(
        self,
        teacher: Any,
        family: Family | None = None,
        weights: LossWeights | None = None,
        chunk_tokens: int | None = None,
        vocabulary: Entries = None,
        intermediate: IntermediateWeights | None = None,
        kept_H: Tensor | None = None,
        place: str = "device",
        student: Student | None = None,
    ) -> None:
        """Takes the teacher.

        Args:
            teacher: the model, or its folder; of a speech model (NeMo's SALM), another one.
            family: its family; None: by its configuration.
            weights: the mix of the losses; None: forward KL alone.
            chunk_tokens: see the class.
            vocabulary: see the class.
            intermediate: see the class.
            kept_H: see the class.
            place: see the class.
            student: how a module is distilled that is no ``MinitronModel``; None: the only Hugging
                Face model in it, whose loss is replaced.

        Raises:
            ValueError: an unknown place, or a folder that holds no model that can be loaded.
        """
        if place not in ("device", "shard", "offload", "cpu"):
            raise ValueError(f"place: expected device, shard, offload or cpu, found {place!r}")
        if isinstance(teacher, str | Path):
            teacher = load_model(Path(teacher), dtype="auto")
        self._speaker: SpeechTeacher | None = None
        if isinstance(teacher, nn.Module) and is_speech_model(teacher):
            self._speaker = SpeechTeacher(teacher)
            teacher = self._speaker.model
            if place != "device":
                raise ValueError(
                    f"place: a speech model teaches on its student's device, found {place!r}"
                )
        self.teacher = teacher.eval().requires_grad_(False)
        self.family = family_of(teacher.config.to_dict()) if family is None else family
        self.weights = LossWeights() if weights is None else weights
        self.chunk_tokens, self._student = chunk_tokens, student or Student()
        self._hooked: HookedStudent | None = None
        self._before: Objective | None = None
        self.vocabulary, self.intermediate, self.kept_H = vocabulary, intermediate, kept_H
        self.place = place
        self._offloaded: Offloaded | None = None
        self._copy: Tensor | None = None
        self._inside: IntermediateLoss | None = None
        self._strategy: Any = None
        self._mesh: Any = None
        self._products: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._compiles_loss: Callable[[], bool] = lambda: False
        self._fast: Compiled | None = None
        self._evaluates = False
        self.teacher_loss: float | None = None
        self._listens, self._sums = False, [0.0, 0.0]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over the model's objective, or the module's loss.

        Raises:
            ValueError: the vocabularies differ, and nothing says how much of them is padding; which
                model is the student cannot be determined.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelTransform):
                callback.setup(trainer, pl_module, stage)
        if isinstance(pl_module, MinitronModel):
            self._before, pl_module.objective = pl_module.objective, self.objective
            student = (pl_module.model, pl_module.family)
        else:
            self._hooked = HookedStudent(pl_module, self._student, self.objective)
            student = (self._hooked.model, self._hooked.family)
        if is_speech_model(pl_module) != (self._speaker is not None):
            self._release(pl_module)
            raise ValueError(
                "KnowledgeDistillation: a speech model of NeMo's speechlm2 is taught by a whole one, such as "
                "copy.deepcopy(model) before it is pruned, and teaches no other"
            )
        ours, theirs = head_of(student[0]).shape[0], head_of(self.teacher).shape[0]
        speaks = self._speaker is not None and isinstance(self.vocabulary, KeptEntries)
        if speaks or not kept_entries.fits(self.vocabulary, ours, theirs):
            self._release(pl_module)
            raise ValueError(f"vocabulary: the teacher has {theirs} entries, the student {ours}")
        if self.intermediate is not None and stage == "fit":
            self._inside = IntermediateLoss(
                self.intermediate, (self.teacher, self.family), student, pl_module, self.kept_H
            )
        self._strategy = trainer.strategy

    def _release(self, pl_module: LightningModule) -> None:
        if self._hooked is not None:
            self._hooked.release()
            self._hooked = None
        if self._before is not None:
            assert isinstance(pl_module, MinitronModel)
            pl_module.objective, self._before = self._before, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the teacher to the student's device, or splits it over the ranks as the student is.

        Raises:
            ValueError: it is to be split, and the student is not.
        """
        self._evaluates = False
        if not isinstance(pl_module, MinitronModel):
            if self.place == "shard":
                raise ValueError("place='shard': only a sharded MinitronModel shares its ranks")
            self._settle(pl_module.device)
            return
        self._mesh, self._compiles_loss, self._products = (
            pl_module.device_mesh, pl_module.compiles_loss, pl_module.products
        )  # fmt: skip
        if pl_module.replacement_layers is not None and self.place in ("device", "shard"):
            LayerReplacement(self.teacher, self.family, pl_module.replacement_layers)
        if self.place == "shard":
            if pl_module.device_mesh is None:
                raise ValueError(
                    "distill.teacher_place=shard: the student is not sharded (training.parallel)"
                )
            self.teacher.to(pl_module.device)
            shard(self.teacher, self.family, pl_module.device_mesh)
        else:
            self._settle(pl_module.device)
        if self.place not in ("device", "shard"):
            return
        at = next(self.teacher.parameters()).device
        if at.type != "cpu" and str(trainer.precision) in _PRODUCTS:
            round_products(self.teacher, self.family, _PRODUCTS[str(trainer.precision)])
        if pl_module.compiled and self._fast is None:
            self._fast = Compiled(self.teacher, self.family, "teacher")

    def _settle(self, device: torch.device) -> None:
        """Brings the teacher to where it runs, if that is this rank alone."""
        if self._speaker is not None:
            self._speaker.module.to(device)
        elif self.place == "device":
            self.teacher.to(device)
        elif self.place == "offload" and self._offloaded is None:
            self._offloaded = Offloaded(self.teacher, self.family, device)

    def _head(self, device: torch.device) -> Tensor:
        """The teacher's head on the loss's device; a kept copy if the teacher is on another device."""
        head_VG = head_of(self.teacher)
        if head_VG.device == device:
            return head_VG
        if self._copy is None:
            self._copy = head_VG.to(device)
        return self._copy

    def replace_teacher(self, model: Any) -> None:
        """Takes over another model's weights; its loss is measured again.

        Raises:
            ValueError: it is not of the teacher's shape.
        """
        new = model.state_dict()
        parameters = self.teacher.named_parameters(remove_duplicate=False)
        ours = {name: t for name, t in [*parameters, *self.teacher.named_buffers()] if name in new}
        wrong = [name for name in new if name not in ours or ours[name].shape != new[name].shape]
        if wrong:
            raise ValueError(f"the new teacher is another model than the first: {wrong[0]} differs")
        if self._offloaded is not None:
            self._offloaded.wait()
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(new[name])
        self._copy, self.teacher_loss = None, None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first validation of a teacher measures it too."""
        if isinstance(pl_module, MinitronModel):
            pl_module.facts.clear()
        self._listens = self.teacher_loss is None and not trainer.sanity_checking
        self._sums = [0.0, 0.0]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the teacher's loss for the log."""
        if self._listens and self._sums[1]:
            self.teacher_loss = self._sums[0] / self._sums[1]
            if isinstance(pl_module, MinitronModel):
                pl_module.facts["teacher_val_loss"] = self.teacher_loss
        self._listens = False

    def state_dict(self) -> dict[str, Any]:
        """The teacher's loss, which is measured once."""
        return {"teacher_loss": self.teacher_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it over."""
        self.teacher_loss = state_dict["teacher_loss"]

    def objective(
        self,
        student: Projection,
        labels_T: Tensor,
        tokens_BS: Tensor | None,
        rows_B: Tensor | None = None,
        **more: Any,
    ) -> LossResult:
        """Divergence from the teacher on the same tokens; shapes as in ``plugin.model.Objective``.

        A speech model's tokens are None, and ``batch`` is what it was given.
        """
        if self._speaker is not None:
            teacher = self._speaker(self.family, more["batch"])
        else:
            assert tokens_BS is not None
            teacher = self._teacher_on(tokens_BS, student.hidden_TH.device, more)
        if self._listens:
            counted = int((labels_T >= 0).sum())
            self._sums[0] += float(cross_entropy(teacher, labels_T).ce) * counted
            self._sums[1] += counted
        counted = None if isinstance(self.vocabulary, KeptEntries) else self.vocabulary
        terms = linear_loss(
            self._mesh, student, labels_T, self.weights, teacher, chunk_tokens=self.chunk_tokens,
            vocabulary=counted, compiled=self._compiles_loss(),
        )  # fmt: skip
        if self._inside is None:
            return terms
        inside = self._inside(labels_T >= 0)
        logits_loss = self.weights.kl * terms.divergence if self.weights.kl else terms.loss
        alpha = self._alpha(logits_loss.detach(), inside.detach())
        more = {"intermediate": inside.detach(), "alpha": alpha}
        return replace(terms, loss=terms.loss + alpha * inside, more=more)

    def _teacher_on(
        self, tokens_BS: Tensor, device: torch.device, more: Mapping[str, Any]
    ) -> Projection:
        """The teacher's hidden states [batch x positions, hidden] and head, where the loss is."""
        at = next(self.teacher.parameters()).device
        # what was put in the place of layers is there by now; not for every batch: it walks through all
        if self.teacher.training or not self._evaluates:
            self.teacher.eval()
            self._evaluates = True
        with (
            torch.no_grad(),
            # compiled code has no need of inference mode, and not every torch compiles in it
            untracked(self.teacher) if self._fast is None else nullcontext(),
            self._products() if at.type != "cpu" else nullcontext(),
        ):
            there = {name: value.to(at) for name, value in more.items()}
            tokens_BS = kept_entries.read_by_teacher(self.vocabulary, tokens_BS)
            hidden_BSG = hidden_states(self.teacher, self.family, tokens_BS.to(at), **there)
        teacher = Projection(
            hidden_BSG.flatten(0, 1).to(device),
            self._head(device),
            softcap_of(self.teacher, self.family),
        )
        return kept_entries.shared(self.vocabulary, teacher, self.weights.divergence.temperature)

    def _alpha(self, logits_loss: Tensor, inside: Tensor) -> Tensor:
        """The weight of the intermediate losses, the same on all ranks."""
        assert self.intermediate is not None and self._strategy is not None
        if self.intermediate.alpha is not None:
            return torch.full_like(inside, self.intermediate.alpha)
        means = self._strategy.reduce(
            torch.stack([logits_loss.float(), inside.float()]), reduce_op="mean"
        )
        return balance(means[0], means[1])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes away what only the training needed; the module's own loss is back."""
        IntermediateLoss.release(pl_module)
        if self._fast is not None:
            self._fast.undo()
            self._fast = None
        self._release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same where the training fails: Lightning calls no ``teardown`` then."""
        self._release(pl_module)


class CachedDistillation(Callback):
    """Trains the model against a teacher's cached logits, without the teacher.

    Attributes:
        cache: the teacher's logits, by number of the sample.
        weights: the mix of the losses.
        chunk_tokens: tokens whose logits exist at a time, or None.
        vocabulary: entries that count; None: all.
    """

    def __init__(
        self,
        cache: TeacherLogits,
        weights: LossWeights,
        chunk_tokens: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.cache, self.weights, self.chunk_tokens = cache, weights, chunk_tokens
        self.vocabulary = vocabulary
        self._before: Objective | None = None
        self._compiles_loss: Callable[[], bool] = lambda: False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over the model's objective.

        Raises:
            ValueError: the module is no ``MinitronModel``: only its samples have numbers.
        """
        if not isinstance(pl_module, MinitronModel):
            raise ValueError(
                f"CachedDistillation: expected a MinitronModel, found {type(pl_module).__name__}"
            )
        self._before, pl_module.objective = pl_module.objective, self.objective
        self._compiles_loss = pl_module.compiles_loss

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the model its own objective back."""
        if self._before is not None and isinstance(pl_module, MinitronModel):
            pl_module.objective, self._before = self._before, None

    def objective(
        self,
        student: Projection,
        labels_T: Tensor,
        tokens_BS: Tensor,
        rows_B: Tensor | None = None,
        **more: Any,
    ) -> LossResult:
        """Divergence from the cached logits; shapes as in ``plugin.model.Objective``."""
        assert rows_B is not None
        targets = self.cache[rows_B.tolist()].to(student.hidden_TH.device)
        return fused_linear_loss(
            student, labels_T, self.weights, targets, chunk_tokens=self.chunk_tokens,
            vocabulary=self.vocabulary, compiled=self._compiles_loss(),
        )  # fmt: skip
