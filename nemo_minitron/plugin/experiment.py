"""NeMo's exp_manager around one training: checkpoints, loggers, and what is kept of them."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from nemo_minitron.config.overrides import duration
from nemo_minitron.security.masking import masked
from nemo_minitron.training.checkpoint_safety import keep_checkpoints_inside
from nemo_minitron.training.early_stopping import judge_again
from nemo_minitron.training.task_curves import judge_when_measured
from nemo_minitron.workspace import training_log
from nemo_minitron.workspace.layout import checkpoints_in, logs_in, metrics_in, nemo_in

_STEP = re.compile(r"step=(\d+)")
_COMMAND_LINE = "cmd-args.log"
_NOTES = (_COMMAND_LINE, "git-info.log", "nemo_error_log.txt", "lightning_logs.txt")
"""What exp_manager writes unasked, of this run alone."""
_PROFILERS: dict[str, Any] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
_DECIDED = (
    "resume_if_exists", "resume_ignore_no_checkpoint", "resume_past_end", "resume_from_checkpoint",
    "create_preemption_callback", "explicit_log_dir", "max_time_per_run",
)  # fmt: skip
"""Keys that say what is done anyway, or that ``Preemption`` heeds."""


def manage(trainer: Trainer, settings: Mapping[str, Any], state: Path) -> None:
    """Hands checkpoints and loggers to NeMo's exp_manager.

    Args:
        trainer: Lightning's Trainer, which gets their callbacks and loggers.
        settings: exp_manager's keys, as ``refuse_exp_manager`` has let them pass.
        state: folder of the training's state.

    Raises:
        ValueError: exp_manager does not know a key, or a package that it asks for is not there.
    """
    folder = nemo_in(state)
    newest = newest_checkpoint(checkpoints_in(state))
    saved = dict(settings.get("checkpoint_callback_params") or {})
    if trainer.is_global_zero and newest is not None:
        _tidy(checkpoints_in(state), saved)
    # a validation that was due behind the checkpoint, and did not come to its end, is made up for
    log = training_log.read_log(metrics_in(state))
    validations = {line["step"]: line for line in log if "val_loss" in line}
    interval = saved.pop("train_time_interval", None)
    if interval is not None:
        saved["every_n_epochs"] = 0  # without any rhythm Lightning takes that of validations
    given = {key: value for key, value in settings.items() if value is not None}
    manager = {
        "disable_validation_on_resume": newest is None or step_of(newest) in validations,
        **{key: value for key, value in given.items() if key not in _DECIDED},
        "checkpoint_callback_params": saved,
        # NeMo's, which it adds on GPUs, would take our signals, save nothing and end with exit
        # status 0
        "create_preemption_callback": False,
        "explicit_log_dir": str(folder),
        "resume_from_checkpoint": None if newest is None else str(newest),
    }
    try:
        exp_manager(trainer, OmegaConf.create(manager))
    except (ConfigKeyError, ImportError) as error:
        raise ValueError(f"exp_manager: {str(error).splitlines()[0]}") from error
    if interval is not None:
        _save_every(trainer, interval)
    keep_checkpoints_inside(trainer, checkpoints_in(state))
    if newest is not None:
        last = step_of(newest) - (not manager["disable_validation_on_resume"])
        judge_again(trainer, [line for step, line in validations.items() if step <= last])
    judge_when_measured(trainer)
    words = folder / _COMMAND_LINE  # NeMo notes the command line as it is
    if trainer.is_global_zero and words.is_file():
        replaced = masked(words.read_text(encoding="utf-8", errors="replace"))
        words.write_text(replaced, encoding="utf-8")


def _save_every(trainer: Trainer, interval: Any) -> None:
    """Lets checkpoints be written by the clock; NeMo's configuration holds no ``timedelta``."""
    for callback in trainer.callbacks:
        if isinstance(callback, NeMoModelCheckpoint):
            callback._train_time_interval = duration(
                "exp_manager.checkpoint_callback_params.train_time_interval", interval
            )


def profiler(name: Any, state: Path) -> Profiler | None:
    """Lightning's profiler of a name, whose report goes to the logs: its screen is silent here.

    Raises:
        ValueError: there is none of that name.
    """
    if name is None:
        return None
    if name not in _PROFILERS:
        raise ValueError(
            f"trainer.profiler: expected one of {', '.join(_PROFILERS)}, found {name!r}"
        )
    made: Profiler = _PROFILERS[name](dirpath=nemo_in(state), filename="profile")
    return made


def end_loggers(trainer: Trainer) -> None:
    """Ends the runs of Weights & Biases, whose files are whole only then."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def keep_logs(state: Path, target: Path) -> None:
    """Puts what loggers and exp_manager have written beside a model; nothing where they have not.

    Files get a second name, so that a kill loses none of them and archives take no more room.

    Args:
        state: folder of the training's state.
        target: the artifact's folder.
    """
    for path, place in _written(state):
        kept = logs_in(target) / place
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, kept)
        except OSError:  # a file system without links
            shutil.copyfile(path, kept)


def _written(state: Path) -> Iterator[tuple[Path, Path]]:
    """Files that were asked for, and their places among the logs; of checkpoints only archives."""
    folder, checkpoints = nemo_in(state), checkpoints_in(state)
    for path in sorted(checkpoints.glob("*.nemo")):
        yield path, path.relative_to(checkpoints)
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(at, name) != checkpoints]
        for path in (Path(at, name) for name in names if name not in _NOTES):
            if path.is_file() and not path.is_symlink():
                yield path, path.relative_to(folder)


def _tidy(folder: Path, settings: Mapping[str, Any]) -> None:
    """Removes finished checkpoints that the next one would have removed if the training had not stopped.

    What is saved on a signal no callback keeps count of; and NeMo forgets sharded ones when it
    resumes.
    """
    most = settings.get("save_top_k")
    if settings.get("monitor") != "step" or not isinstance(most, int) or most < 1:
        return  # it is not the newest that are to be kept
    for path in sorted(_finished(folder), key=step_of)[:-most]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _finished(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.glob("*.ckpt")
        if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)
    ]


def newest_checkpoint(folder: Path) -> Path | None:
    """The finished checkpoint with the highest step in its name, or None."""
    return max(_finished(folder), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 where there is none."""
    return int(match.group(1)) if (match := _STEP.search(checkpoint.name)) else -1
