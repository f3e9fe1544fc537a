"""A causal LM of any supported family as a NeMo model, for pretraining, correction and distillation."""

import contextlib
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
from nemo_minitron.plugin.nemo_archive import (
    as_stored,
    check_archive,
    check_restored,
    damage,
    dtypes_of,
    file_name,
    make_cfg,
)
from nemo_minitron.training.loss_guard import gradient_norm
from nemo_minitron.training.sampler import (
    ConsumedSampler,
    as_samples,
    packed_tokens,
    train_loader,
    validation_loader,
)
from nemo_minitron.training.strategies import gathered, shard
from nemo_minitron.training.token_weighting import LearnedTokens, labels_of
from nemo_minitron.training.transformer_engine import (
    EXTRA_STATE,
    LayerReplacement,
    ReplacementLayers,
)

Objective = Callable[[Projection, Tensor, Tensor, Tensor | None], LossResult]
"""From hidden states [tokens, hidden] and head [vocabulary, hidden], labels [tokens], token ids
[batch, positions] and the samples' numbers [batch], if they have some, to the loss."""


def followed(before: Architecture, now: Architecture) -> dict[str, Any]:
    """A config.json with the sizes, and what it lists per unit, of the model in memory.

    transformers does not keep every spelling of a list (Nemotron-H's ``hybrid_override_pattern``
    becomes ``layers_block_type``): one that it has dropped stays as it is while it still fits.
    """
    changed = dict(before.resized(now.sizes).config)
    for name, axis in before.family.axes.items():
        held = [key for key in (*axis.lists, *axis.indices) if key in changed]
        lost = [key for key in held if key not in now.config]
        changed |= {key: now.config[key] for key in held if key not in lost}
        if lost and before.sizes[name] != now.sizes[name]:
            other = {key: now.config[key] for key in axis.lists if key in now.config}
            assert other, f"{lost}: transformers keeps no spelling of it"
            changed = {key: value for key, value in changed.items() if key not in lost} | other
    return changed


class MinitronModel(ModelPT):
    """A Hugging Face causal LM with NeMo's configuration, optimisers, exp_manager and ``.nemo`` archives.

    The model's ``cfg`` holds:

    * ``hf_config``: the model's config.json;
    * ``files``: tokenizer, generation config, card and licence files, carried inside ``.nemo``
    archives;
    * ``dtypes``: optional, dtypes to the names of parameters that are stored in them;
    * ``optim``: a NeMo optimiser and scheduler;
    * ``train_ds``, ``validation_ds``: optional, ``paths``, ``exclude``, ``format``, ``text_key``,
      ``sequence_length``, ``samples``, ``seed``, ``batch_size`` and ``tokenizer`` (a model's
      folder).

    It minimises cross-entropy; the ``KnowledgeDistillation`` callback replaces ``objective``.

    Attributes:
        model: the Hugging Face model.
        objective: from hidden states to the loss.
        facts: numbers that belong into the log beside every validation.
        kit: layers of another engine that the model's are exchanged for; None: its own.
        compiled: whether the loss is compiled.
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
        hf_config = OmegaConf.to_container(self.cfg.hf_config, resolve=True)
        assert isinstance(hf_config, dict)
        self.family = family_of(hf_config, "hf_config")
        self.model = as_stored(new_model(hf_config, seed=0), self.cfg) if model is None else model
        self.objective: Objective = self.cross_entropy
        self.facts: dict[str, float] = {}
        self._sharded, self._gathered = False, None
        self.learned = LearnedTokens()
        self.replacement_layers: ReplacementLayers | None = None
        self._replacement: LayerReplacement | None = None
        self.compiled = False
        self.side_files: dict[str, bytes] = {}
        for name, path in (self.cfg.files or {}).items():
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
            **rest: ``trainer``, and further entries of ``cfg``.
        """
        folder, trainer = Path(folder), rest.pop("trainer", None)
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
            told = damage(error)
            if told is None:
                raise
            raise ValueError(f"{restore_path}: a damaged .nemo archive: {told}") from error

    @classmethod
    def list_available_models(cls) -> None:
        """No models are registered with NVIDIA's catalogue."""
        return None

    def setup_training_data(self, train_data_config: DictConfig) -> None:
        """Builds the training loader from ``cfg.train_ds``."""
        tokens_NS = packed_tokens(train_data_config, "train_ds")
        self.use_training_samples(tokens_NS, train_data_config.batch_size, train_data_config.seed)

    def setup_validation_data(self, val_data_config: DictConfig) -> None:
        """Builds the validation loader from ``cfg.validation_ds``."""
        self.use_validation_samples(
            packed_tokens(val_data_config, "validation_ds"), val_data_config.batch_size
        )

    def setup_multiple_validation_data(self, val_data_config: DictConfig) -> None:
        """Sets up one validation set; NeMo's own method would make one of every entry of ``paths``."""
        self._update_dataset_config(dataset_name="validation", config=val_data_config)
        self.setup_validation_data(val_data_config)

    def use_training_samples(
        self,
        given: Any,
        batch_size: int,
        seed: int,
        skipped: frozenset[int] = frozenset(),
        tensor_parallel: int = 1,
    ) -> None:
        """Trains on packed samples: a data set of them, or a Tensor of shape [samples, positions + 1].

        ``skipped`` are steps of the order that ``seed`` draws which are left out. Ranks that share
        the work of one model by tensor parallelism read the same samples.
        """
        trainer, samples = self._trainer, as_samples(given)
        world = max(1, trainer.world_size // tensor_parallel)
        per_step = trainer.accumulate_grad_batches
        batches = len(samples) // (batch_size * world)
        if trainer.max_steps > 0:
            batches = trainer.max_steps * per_step
        sampler = ConsumedSampler(
            samples=len(samples),
            batch_size=batch_size,
            batches=batches,
            consumed=lambda: trainer.global_step * per_step,
            rank=trainer.global_rank // tensor_parallel,
            world=world,
            seed=seed,
            skipped=frozenset(
                step * per_step + part for step in skipped for part in range(per_step)
            ),
        )
        self._train_dl = train_loader(samples, sampler)

    def use_validation_samples(self, given: Any, batch_size: int) -> None:
        """Validates on packed samples: a data set of them, or a Tensor of shape [samples, positions + 1]."""
        self._validation_dl = validation_loader(as_samples(given), batch_size)

    def configure_model(self) -> None:
        """Exchanges layers, and splits the model over the ranks that the strategy has laid out as a mesh."""
        if self.replacement_layers is not None and self._replacement is None:
            self._replacement = LayerReplacement(self.model, self.family, self.replacement_layers)
        if self.device_mesh is None or self._sharded:
            return
        self._sharded = True
        shard(self.model, self.family, self.device_mesh)
        if hasattr(self, "projection"):  # of a distillation by hidden states
            fully_shard(self.projection, mesh=self.device_mesh["data_parallel"])

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips by the norm over all ranks' parts; by value as Lightning does."""
        if not self._sharded or str(gradient_clip_algorithm or "norm") == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [
                parameter for parameter in self.parameters() if parameter.grad is not None
            ]
            torch.nn.utils.clip_grads_with_norm_(
                parameters, gradient_clip_val, gradient_norm(self), foreach=False
            )

    def gather(self) -> None:
        """Brings a sharded model's weights together on rank 0, for ``save_hf``; all ranks call it."""
        if self._sharded:
            whole, first = gathered(self.model), dict[int, str]()
            tied = [
                name
                for name, parameter in self.model.named_parameters(remove_duplicate=False)
                if first.setdefault(id(parameter), name) != name
            ]  # gathered twice, they would be stored twice
            self._gathered = {
                key: value
                for key, value in whole.items()
                if not key.endswith(EXTRA_STATE) and key not in tied
            }

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Last hidden states: [batch, positions] token ids to [batch, positions, hidden]."""
        with self.products():
            return hidden_states(self.model, self.family, tokens_BS)

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the layers' matrix products: FP8 if Transformer Engine is set so."""
        return (
            contextlib.nullcontext()
            if self.replacement_layers is None
            else self.replacement_layers.context()
        )

    def _own_layers(self) -> contextlib.AbstractContextManager[None]:
        """Puts the Hugging Face model's own layers back during the block."""
        return contextlib.nullcontext() if self._replacement is None else self._replacement.undone()

    def evaluate_objective(self, batch: Tensor | Sequence[Tensor]) -> LossResult:
        """The objective on one batch of packed samples, Tensor of shape [batch, positions + 1].

        Their numbers, Tensor of shape [batch], come with them where the data set gives any.

        Negative entries ~id are read, and not learned: as labels they do not count.
        """
        batch_BS, rows_B = (batch, None) if isinstance(batch, Tensor) else batch
        tokens_BS, labels_BS = (
            torch.where(batch_BS < 0, ~batch_BS, batch_BS)[:, :-1],
            batch_BS[:, 1:],
        )
        student = projection_of(self.model, self.family, self(tokens_BS).flatten(0, 1))
        return self.objective(student, labels_BS.flatten(), tokens_BS, rows_B)

    def cross_entropy(
        self, student: Projection, labels_T: Tensor, tokens_BS: Tensor, rows_B: Tensor | None = None
    ) -> LossResult:
        """The objective of pretraining and teacher correction: mean cross-entropy with the next token."""
        shard, student, _ = sharded(self.device_mesh, student)
        return cross_entropy(student, labels_T, shard=shard, compiled=self.compiled)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One micro-batch: the loss to differentiate, weighed by its learned tokens; its terms are logged."""
        terms = self.evaluate_objective(batch)
        named = {f"train_{name}": value for name, value in terms.named().items()}
        self.log_dict(named, batch_size=len(labels_of(batch)))
        self.last_terms, share = terms, self.learned.share(batch)
        self.learned.note(terms)
        return terms.loss * share

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Turns the step's gradients into those of the mean over its learned tokens."""
        self.learned.weigh(self, self._trainer.strategy)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs means over the validation set: cross-entropy and divergence from the teacher."""
        terms = self.evaluate_objective(batch)
        how = {
            "on_epoch": True,
            "sync_dist": True,
            "batch_size": int((labels_of(batch) >= 0).sum()),
        }
        self.log("val_loss", terms.ce, prog_bar=True, **how)
        if "divergence" in terms.named():
            self.log("val_divergence", terms.divergence, **how)

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> None:
        """Does nothing: ``validation_step`` logs means already."""

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
        """Writes a ``.nemo`` archive of the model as it is now."""
        self.follow_model()
        with self._own_layers():
            super().save_to(save_path)

    def save_hf(self, folder: Path) -> None:
        """Writes a Hugging Face folder: weights, the config.json and the tokenizer that the model came with.

        Args:
            folder: an existing folder.
        """
        self.follow_model()
        config = OmegaConf.to_container(self.cfg.hf_config, resolve=True)
        assert isinstance(config, dict)
        with self._own_layers():
            save_model(
                self.model,
                folder,
                {str(key): value for key, value in config.items()},
                self._gathered,
            )
        for name, content in self.side_files.items():
            write_side_file(folder, name, content)
