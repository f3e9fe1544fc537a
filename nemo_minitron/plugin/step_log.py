"""Logging the values of a step."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor


def log_step(module: LightningModule, values: Mapping[str, Tensor], batch_size: int) -> None:
    """As ``module.log_dict``, for values of single steps; not for means over an epoch.

    Lightning checks again at every call what it found right at the first, and copies all that it knows
    of a name: a third of a millisecond each, in which a GPU waits. From the second batch of an epoch
    on, names that it knows are given their values alone.

    Args:
        module: in one of its hooks.
        values: a tensor without dimensions for each name.
        batch_size: samples in the batch.
    """
    trainer = module._trainer
    known = trainer is not None and trainer._logger_connector._first_loop_iter is False
    results = trainer._results if trainer is not None and known else None
    for name, value in values.items():
        key = f"{module._current_fx_name}.{name}"
        if results is None or key not in results or results[key].meta.on_epoch:
            module.log(name, value, batch_size=batch_size)
        else:
            results.update_metrics(key, value.detach(), batch_size)
