"""Logging and warnings of NeMo and Lightning."""

import logging
import re
import warnings

import nemo.utils.exp_manager
from nemo.lightning.callback_group import CallbackGroup
from nemo.lightning.one_logger_callback import OneLoggerNeMoCallback
from nemo.utils import logging as nemo_logging
from nv_one_logger.api.one_logger_provider import OneLoggerProvider


def silence_third_parties() -> None:
    """Silences NeMo's and Lightning's log lines, which would break the progress bar.

    Warnings of substance remain.
    """
    nemo_logging.setLevel(logging.ERROR)
    # exp_manager asks git about the working folder, and git runs what the configuration of a
    # repository there says (core.fsmonitor); nor does the user's diff belong into a run's folder
    nemo.utils.exp_manager.get_git_hash = lambda: (False, "")
    # NeMo's telemetry, which is sent nowhere, is on for rank 0 of several, and fails where a training
    # begins once more in a process, as behind a bad step
    OneLoggerProvider.instance().force_disable_logging()
    # switched off it would still set a logger's level, for which Python visits all others, twice a step
    group = CallbackGroup.get_instance().callbacks
    group[:] = [each for each in group if not isinstance(each, OneLoggerNeMoCallback)]
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    known = (
        "does not have many workers",
        "not resumable",
        "LeafSpec",
        "isinstance(treespec",
        "lr_scheduler.step",
    )
    for text in known:
        warnings.filterwarnings("ignore", message=f".*{re.escape(text)}.*")
