"""How long a flow waits for its turn at a workspace."""

from prefect.context import FlowRunContext

from nemo_minitron.launch.accelerator import ENDING_SECONDS
from nemo_minitron.stages.launch_config import LaunchConfig

_A_YEAR = 365 * 86400.0


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
        return _A_YEAR
    return max(launch.wait, launch.grace + ENDING_SECONDS)
