"""Arguments of Lightning's trainer: merges sections, and selects those that decide the weights."""

from collections.abc import Mapping
from typing import Any


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``changes`` that are not null, section by section."""
    result = dict(base)
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = merged(result[name], value)
        elif value is not None:
            result[name] = value
    return result


_NOT_DECIDING = (
    "devices",  # what counts is how many samples they read together
    "num_nodes",
    "strategy",
    "accumulate_grad_batches",
    "val_check_interval",  # neither does looking change what is looked at
    "check_val_every_n_epoch",
    "limit_val_batches",
    "num_sanity_val_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
    "default_root_dir",
    "callbacks",  # those that are let through only look
)


def deciding(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer arguments that decide the weights, for fingerprints.

    What only changes the display, or who does the work, is left out.
    """
    return {name: value for name, value in trainer.items() if name not in _NOT_DECIDING}
