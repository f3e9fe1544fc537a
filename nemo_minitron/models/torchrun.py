"""This process among those that torchrun started, without importing torch."""

import os


def is_follower() -> bool:
    """Whether torchrun started this process and it is not rank 0, which holds the workspace."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def join_ranks() -> None:
    """Under torchrun, waits until rank 0 is here too, so that its files exist for all ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from nemo_minitron.models.ranks import join

        join("auto").broadcast(None)


def leave_ranks() -> None:
    """Under torchrun, closes the processes' connection after all of them have finished with it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from nemo_minitron.models.ranks import leave

        leave()
