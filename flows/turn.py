"""Whose turn it is: at a workspace, and on an accelerator."""

import contextlib
import math
import os
import tempfile
from pathlib import Path

from prefect.context import FlowRunContext

from nemo_minitron.stages.launch_config import LaunchConfig

_ENDING_SECONDS = 120.0


def patience(launch: LaunchConfig) -> float:
    """Seconds to wait for a workspace that another run holds.

    A run that is resumed may be under way before the process that it was suspended in has ended, and must not
    be refused by itself: it waits for as long as that may take. A stage inside the flow's process, or in a
    batch job, comes to its end first, whenever that is.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    # Prefect counts a resumed run as one and the same, but it has spent time in the state Running before
    resumed = run is not None and run.total_run_time.total_seconds() > 0
    if not resumed:
        return launch.wait
    if launch.kind in ("inline", "slurm"):
        return math.inf
    return max(launch.wait, launch.grace + _ENDING_SECONDS)


def locks() -> Path:
    """The folder of all users' locks on accelerators.

    Raises:
        ValueError: it is there, and not for all to write.
    """
    folder = Path(tempfile.gettempdir()) / "nemo_minitron-locks"
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o777)  # whatever the umask; not sticky, else Linux keeps one user from another's file
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"launch.accelerator: {folder}: expected a folder that all users may write to")
    return folder
