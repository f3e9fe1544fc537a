"""A causal LM of any supported family as a NeMo model, for pretraining, correction and distillation."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.checkpoints.side_files import write_side_file
from nemo_minitron.distillation.parallel_loss import sharded
from nemo_minitron.families import Architecture, family_of
from nemo_minitron.losses.fused_linear_loss import LossResult, cross_entropy
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.causal_lm import (
    hidden_states,
    load_model,
    new_model,
    projection_of,
    save_model,
)
from nemo_minitron.models.trainable import train_only
from nemo_minitron.plugin.clipping import Clipping
from nemo_minitron.plugin.fast_on_gpus import FastOnGpus
from nemo_minitron.plugin.nemo_archive import (
    ANY_SUBCLASS,
    TARGET,
    as_stored,
    check_archive,
    check_restored,
    damage,
    dtypes_of,
    file_name,
    followed,
    make_cfg,
)
from nemo_minitron.plugin.own_loaders import OwnLoaders
from nemo_minitron.plugin.step_log import log_step
from nemo_minitron.training.batches import as_batch
from nemo_minitron.training.loss_guard import gradients_of, settle
from nemo_minitron.training.phases import learning_rate
from nemo_minitron.training.sampler import ConsumedSampler
from nemo_minitron.training.strategies import gathered, shard
from nemo_minitron.training.token_weighting import LearnedTokens
from nemo_minitron.training.transformer_engine import (
    LayerReplacement,
    ReplacementLayers,
)

Objective = Callable[..., LossResult]
"""From hidden states [tokens, hidden] and head [vocabulary, hidden], labels [tokens], token ids
[batch, positions] and the samples' numbers [batch], if they have some, to the loss; further arguments
of the decoder, such as ``attention_mask``, come by name."""


class MinitronModel(OwnLoaders, FastOnGpus, Clipping, ModelPT):
    """A Hugging Face causal LM with NeMo's configuration, optimisers, exp_manager and ``.nemo`` archives.

    The model's ``cfg`` holds:

    * ``hf_config``: the model's config.json;
    * ``files``: tokenizer, generation config, card and licence files, carried inside ``.nemo``
    archives;
    * ``dtypes``: optional, dtypes to the names of parameters that are stored in them;
    * ``optim``: a NeMo optimiser and scheduler;
    * ``only``: optional, patterns of the parameters that train, as ``training.only``;
    * ``train_ds``, ``validation_ds``, ``test_ds``: optional, see ``plugin.data_sets.DataSet``; of the
      last two each entry of ``paths`` is a set of its own, with a name.

    Batches of one's own loaders may have any of the shapes of ``training.batches.as_batch``.

    It minimises cross-entropy; the ``KnowledgeDistillation`` callback replaces ``objective``.

    Attributes:
        model: the Hugging Face model.
        objective: from hidden states to the loss.
        facts: numbers that belong into the log beside every validation.
        replacement_layers: layers of another engine that the model's are exchanged for; None: its own.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None, model: Any = None) -> None:
        """Builds the model.

        Args:
            cfg: see the class.
            trainer: Lightning's Trainer.
            model: the Hugging Face model where it exists already; None: random weights.
        """
        if self._is_model_being_restored():  # by whatever call of NeMo's
            check_restored(cfg, "model_config.yaml")
        super().__init__(cfg=cfg, trainer=trainer)
        with open_dict(self._cfg):
            self._cfg.target = TARGET if type(self) is MinitronModel else ANY_SUBCLASS
        self.cfg = self._cfg  # NeMo's setter, which hands it on to the hyperparameters
        if not isinstance(self.cfg.get("hf_config"), DictConfig):
            raise ValueError(
                f"hf_config: expected a model's config.json, found {self.cfg.get('hf_config')}"
            )
        hf_config = OmegaConf.to_container(self.cfg.hf_config, resolve=True)
        assert isinstance(hf_config, dict)
        self.family = family_of(hf_config, "hf_config")
        if model is None:
            model = as_stored(new_model(hf_config, 0, "hf_config"), self.cfg)
        self.model = model
        if self.cfg.get("only"):
            train_only(model, self.family, list(self.cfg.only))
        self.objective: Objective = self.cross_entropy
        self.facts: dict[str, float] = {}
        self._sharded, self._gathered = False, None
        self.learned = LearnedTokens()
        self.replacement_layers: ReplacementLayers | None = None
        self._replacement: LayerReplacement | None = None
        self.side_files: dict[str, bytes] = {}
        for name, path in (self.cfg.get("files") or {}).items():
            source = self.register_artifact(f"files.{name}", path)
            self.side_files[file_name(name)] = Path(source).read_bytes()

    @classmethod
    def from_hf(
        cls,
        folder: Path | str,
        optim: dict[str, Any] | None = None,
        dtype: torch.dtype | str = torch.float32,
        **rest: Any,
    ) -> "MinitronModel":
        """Loads a Hugging Face folder for training.

        Args:
            folder: model folder, tokenizer beside it.
            optim: NeMo optimiser and scheduler.
            dtype: dtype of the trained weights; ``auto``: as they are stored, which an archive
                keeps.
            **rest: ``trainer``, and further entries of ``cfg``; data sets without a ``tokenizer``
                take the folder's.
        """
        folder, trainer = Path(folder), rest.pop("trainer", None)
        for name in ("train_ds", "validation_ds", "test_ds"):
            if rest.get(name) is not None:
                rest[name] = {"tokenizer": str(folder), **rest[name]}
        model = load_model(folder, dtype=dtype).train()
        rest |= {"dtypes": dtypes_of(model)} if dtype == "auto" else {}
        return cls(make_cfg(read_config(folder), folder, optim, **rest), trainer, model)

    @classmethod
    def restore_from(cls, restore_path: str, *more: Any, **options: Any) -> Any:
        """Restores a ``.nemo`` archive as NeMo does, and reads nothing outside of it.

        Raises:
            ValueError: it is none of this class, or reaches out of itself.
        """
        if Path(restore_path).is_file():
            check_archive(Path(restore_path))
        try:
            return super().restore_from(restore_path, *more, **options)
        except BaseException as error:
            cls._set_model_restore_state(is_being_restored=False)  # which NeMo leaves as it was
            problem = damage(error)
            if problem is None:
                raise
            raise ValueError(f"{restore_path}: a damaged .nemo archive: {problem}") from error

    @classmethod
    def list_available_models(cls) -> None:
        """No models are registered with NVIDIA's catalogue."""
        return None

    def configure_model(self) -> None:
        """Exchanges layers, and splits the model over the ranks that the strategy has laid out as a mesh."""
        if self.replacement_layers is not None and self._replacement is None:
            self._replacement = LayerReplacement(self.model, self.family, self.replacement_layers)
            if self._trainer is None or self._trainer.is_global_zero:
                print(f"training.transformer_engine: {self._replacement}", file=sys.stderr)
        if self.device_mesh is None or self._sharded:
            return
        self._sharded = True
        shard(self.model, self.family, self.device_mesh)
        if hasattr(self, "projection"):  # of a distillation by hidden states
            fully_shard(self.projection, mesh=self.device_mesh["data_parallel"])

    def gather(self) -> None:
        """Brings a sharded model's weights together on rank 0, for ``save_hf``; all ranks call it.

        A batch that is trained on afterwards makes it forget them.

        Raises:
            BadStep: the weights are those of a step that must not have been taken.
        """
        settle(self._trainer)
        if self._sharded:
            whole, first = gathered(self.model), dict[int, str]()
            tied = [
                name
                for name, parameter in self.model.named_parameters(remove_duplicate=False)
                if first.setdefault(id(parameter), name) != name
            ]  # gathered twice, they would be stored twice
            self._gathered = {key: value for key, value in whole.items() if key not in tied}

    def forward(self, tokens_BS: Tensor, **more: Any) -> Tensor:
        """Last hidden states: [batch, positions] token ids to [batch, positions, hidden].

        ``more`` are further arguments of the decoder, such as ``attention_mask``.
        """
        with self.products():
            return hidden_states(self.model, self.family, tokens_BS, **more)

    def setup_optimizer_param_groups(self) -> None:
        """NeMo's, without what ``only`` leaves frozen: the optimiser keeps no state for it."""
        super().setup_optimizer_param_groups()
        if self.cfg.get("only") and self._optimizer_param_groups:
            for group in self._optimizer_param_groups:
                group["params"] = [one for one in group["params"] if one.requires_grad]
            kept = [group for group in self._optimizer_param_groups if group["params"]]
            self._optimizer_param_groups = kept

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the layers' matrix products: FP8 if Transformer Engine is set so."""
        return (
            contextlib.nullcontext()
            if self.replacement_layers is None
            else self.replacement_layers.context()
        )

    def own_layers(self) -> contextlib.AbstractContextManager[None]:
        """Puts the Hugging Face model's own layers back during the block."""
        return contextlib.nullcontext() if self._replacement is None else self._replacement.undone()

    def evaluate_objective(self, batch: Any) -> LossResult:
        """The objective on one batch, in any of the shapes that ``training.batches.as_batch`` takes."""
        given = as_batch(batch)
        hidden_TH = self(given.tokens_BS, **given.more).flatten(0, 1)
        student = projection_of(self.model, self.family, hidden_TH)
        return self.objective(
            student, given.labels_BS.flatten(), given.tokens_BS, given.rows_B, **given.more
        )

    def cross_entropy(
        self,
        student: Projection,
        labels_T: Tensor,
        tokens_BS: Tensor,
        rows_B: Tensor | None = None,
        **more: Any,
    ) -> LossResult:
        """The objective of pretraining and teacher correction: mean cross-entropy with the next token."""
        shard, student, _ = sharded(self.device_mesh, student)
        return cross_entropy(student, labels_T, shard=shard, compiled=self.compiles_loss())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One micro-batch: the loss to differentiate, weighed by its learned tokens; its terms are logged."""
        given = as_batch(batch)
        terms = self.evaluate_objective(given)
        named = {f"train_{name}": value for name, value in terms.named().items()}
        log_step(self, named, batch_size=len(given.tokens_BS))
        self.last_terms, share = terms, self.learned.share(given, self._trainer)
        self.learned.note(terms)
        return terms.loss * share

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Turns the step's gradients into those of the mean over its learned tokens."""
        self.learned.weigh(gradients_of(optimizer), self._trainer)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs means over a validation set: cross-entropy and divergence from the teacher.

        ``val_loss`` is that of the first set; where there are several, each has one under its name.
        """
        names = getattr(self, "_validation_names", None)
        self._measure(batch, "val", dataloader_idx, names)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same for test sets: ``test_loss`` and, of a distillation, ``test_divergence``."""
        names = getattr(self, "_test_names", None)
        self._measure(batch, "test", dataloader_idx, names)

    def _measure(self, batch: Any, kind: str, number: int, names: Sequence[str] | None) -> None:
        given = as_batch(batch)
        terms = self.evaluate_objective(given)
        how = {
            "on_epoch": True,
            "sync_dist": True,
            "batch_size": int((given.labels_BS >= 0).sum()),
            "add_dataloader_idx": False,
        }
        prefixes = [""] if number == 0 else []
        if number or names is not None:
            prefixes.append(f"{number}_" if names is None else names[number])
        for prefix in prefixes:
            self.log(f"{prefix}{kind}_loss", terms.ce, prog_bar=prefix == "", **how)
            if "divergence" in terms.named():
                self.log(f"{prefix}{kind}_divergence", terms.divergence, **how)

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> None:
        """Does nothing: ``validation_step`` logs means already."""

    def on_test_epoch_end(self) -> None:
        """Does nothing: ``test_step`` logs means already."""

    def on_train_batch_start(self, batch: Any, batch_idx: int, unused: int = 0) -> int | None:
        """Logs ``learning_rate`` and ``global_step``, as NeMo's models do; a step may begin."""
        if batch_idx % self._trainer.accumulate_grad_batches == 0:
            self.learned.begin()  # as Lightning, which makes its gradients zero then
            self._gathered = None
        rate = learning_rate(self._trainer)
        values = {"learning_rate": rate, "global_step": self._trainer.global_step}
        # tensors on the CPU: Lightning would bring numbers to the device, and wait until they are
        # there
        log_step(self, {name: torch.tensor(float(v)) for name, v in values.items()}, batch_size=1)
        answer: int | None = super().on_train_batch_start(batch, batch_idx, unused)
        return answer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the batches of every step that was taken as done: checkpoints are written behind steps.

        Lightning 2.4 counts one too few, and would step too early where gradients are accumulated.
        """
        super().on_load_checkpoint(checkpoint)
        self.choose_kernels(checkpoint)
        sampler = getattr(self._train_dl, "batch_sampler", None)
        if "loops" not in checkpoint or not isinstance(sampler, ConsumedSampler):
            return
        at = sampler.schedule(checkpoint["global_step"])
        each = at.limited or at.length
        done = (at.start - 1) % each + 1 if at.start else 0  # of an epoch that is over: all
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        progress.update(dict.fromkeys(("ready", "started", "processed", "completed"), done))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the shape that the model has now into the checkpoint, so that it loads as it is."""
        super().on_save_checkpoint(checkpoint)
        self.follow_model()
        stored = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if stored is not None:
            with open_dict(stored["cfg"]):
                stored["cfg"]["hf_config"] = self.cfg.hf_config

    def follow_model(self) -> None:
        """Writes the sizes that the model has now into ``cfg.hf_config``: a transform may have pruned it."""
        config = self.model.config.to_dict()
        now = Architecture(self.family, config)
        stored = OmegaConf.to_container(self.cfg.hf_config, resolve=True)
        assert isinstance(stored, dict)
        before = Architecture(self.family, {str(key): value for key, value in stored.items()})
        changed = followed(before, now)
        if changed != stored:
            with open_dict(self.cfg):
                self.cfg.hf_config = changed

    def save_to(self, save_path: str) -> None:
        """Writes a ``.nemo`` archive of the model as it is now.

        Raises:
            ValueError: the model is split over ranks, none of which has all of it.
            BadStep: the weights are those of a step that must not have been taken.
        """
        settle(self._trainer)
        if self._sharded:
            raise ValueError(
                "save_to: the model is split over ranks; gather() and save_hf(folder) write it, and "
                "MinitronModel.from_hf(folder).save_to(path) an archive"
            )
        self.follow_model()
        with self.own_layers():
            super().save_to(save_path)

    def save_hf(self, folder: Path) -> None:
        """Writes a Hugging Face folder: weights, the config.json and the tokenizer that the model came with.

        Args:
            folder: an existing folder.

        Raises:
            ValueError: the model is split over ranks, and ``gather`` was not called behind its last step.
        """
        if self._sharded and self._gathered is None:
            raise ValueError(
                "save_hf: the model is split over ranks, none of which has all of it; call gather() on all "
                "ranks after the training, and then save_hf(folder) on rank 0"
            )
        self.follow_model()
        config = OmegaConf.to_container(self.cfg.hf_config, resolve=True)
        assert isinstance(config, dict)
        with self.own_layers():
            save_model(
                self.model,
                folder,
                {str(key): value for key, value in config.items()},
                self._gathered,
            )
        for name, content in self.side_files.items():
            write_side_file(folder, name, content)
