"""How long a flow waits for its turn at a workspace."""

from prefect.context import FlowRunContext

_RESUMED_SECONDS = 120.0


def patience(wait: float) -> float:
    """Seconds to wait for a workspace that another run holds.

    A run that is resumed may be under way before the process that it was suspended in has quite ended, and
    must not be refused by itself: it waits two minutes at least.

    Args:
        wait: the configuration's (``launch.wait``), in seconds.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    # Prefect counts a resumed run as one and the same, but it has spent time in the state Running before
    resumed = run is not None and run.total_run_time.total_seconds() > 0
    return max(wait, _RESUMED_SECONDS) if resumed else wait
