"""The part of ``MinitronModel`` that makes its data loaders, out of ``cfg`` or of given samples."""

from functools import partial
from typing import Any

from omegaconf import DictConfig

from nemo_minitron.plugin.data_sets import data_set, loaders_of, samples_of
from nemo_minitron.training.phases import PhasedSamples
from nemo_minitron.training.sampler import (
    ConsumedSampler,
    as_samples,
    schedule_of,
    train_loader,
    validation_loader,
)


class OwnLoaders:
    """Data loaders of a ``ModelPT``; to be inherited from before it."""

    _trainer: Any
    _update_dataset_config: Any

    def setup_training_data(self, train_data_config: DictConfig) -> None:
        """Builds the training loader from ``cfg.train_ds``; its keys: ``plugin.data_sets.DataSet``.

        Raises:
            ValueError: see ``data_set`` and ``samples_of``.
        """
        found = data_set(train_data_config, "train_ds")
        self.use_training_samples(
            samples_of(found, "train_ds"),
            found.batch_size,
            found.seed if found.shuffle else None,
            num_workers=found.num_workers,
            pin_memory=found.pin_memory,
        )

    def setup_validation_data(self, val_data_config: DictConfig) -> None:
        """Builds the validation loaders, one for each entry of ``cfg.validation_ds.paths``."""
        self.setup_multiple_validation_data(val_data_config)

    def setup_multiple_validation_data(self, val_data_config: DictConfig) -> None:
        """The same; NeMo's own takes whatever key holds a path first for the one that lists the sets."""
        self._update_dataset_config(dataset_name="validation", config=val_data_config)
        self._validation_dl, self._validation_names = loaders_of(val_data_config, "validation_ds")

    def setup_test_data(self, test_data_config: DictConfig) -> None:
        """Builds the test loaders, one for each entry of ``cfg.test_ds.paths``."""
        self.setup_multiple_test_data(test_data_config)

    def setup_multiple_test_data(self, test_data_config: DictConfig) -> None:
        """The same."""
        self._update_dataset_config(dataset_name="test", config=test_data_config)
        self._test_dl, self._test_names = loaders_of(test_data_config, "test_ds")

    def use_training_samples(
        self,
        given: Any,
        batch_size: int,
        seed: int | None,
        skipped: frozenset[int] = frozenset(),
        tensor_parallel: int = 1,
        whole: bool = False,
        **how: Any,
    ) -> None:
        """Trains on packed samples: a data set of them, or a Tensor of shape [samples, positions + 1].

        ``skipped`` are steps of the order that ``seed`` draws which are left out. Ranks that share
        the work of one model by tensor parallelism read the same samples. The trainer may be given
        later. ``whole``: see ``schedule_of``. ``how``: further arguments of the ``DataLoader``.
        """
        samples = as_samples(given)
        per_step = 1 if self._trainer is None else self._trainer.accumulate_grad_batches
        sampler = ConsumedSampler(
            len(samples),
            batch_size,
            lambda step=None: schedule_of(
                self._trainer, len(samples), batch_size, tensor_parallel, whole, step
            ),
            seed,
            frozenset(step * per_step + part for step in skipped for part in range(per_step)),
            partial(samples.place, per_step=per_step)
            if isinstance(samples, PhasedSamples)
            else None,
        )
        self._train_dl = train_loader(samples, sampler, **{**self._for_device(), **how})

    def on_train_start(self) -> None:
        """Goes on with the next epoch where the checkpoint has all of one.

        Lightning would read one more batch, and take a step by it, where no validation is due then.
        """
        super().on_train_start()  # type: ignore[misc]
        fit = self._trainer.fit_loop
        loop = fit.epoch_loop
        over = loop.restarting and loop._num_ready_batches_reached()
        if over and not loop._should_check_val_fx(fit._data_fetcher):
            loop.val_loop._has_run = True  # by which Lightning tells that nothing is left to do

    def use_validation_samples(self, given: Any, batch_size: int) -> None:
        """Validates on packed samples: a data set of them, or a Tensor of shape [samples, positions + 1]."""
        self._validation_dl = validation_loader(as_samples(given), batch_size, **self._for_device())

    def _for_device(self) -> dict[str, Any]:
        """Batches in memory that CUDA reads while the host goes on."""
        trainer = self._trainer
        return {"pin_memory": trainer is not None and trainer.strategy.root_device.type == "cuda"}
