"""This process among those that torchrun started, without importing torch."""

import os


def is_follower() -> bool:
    """Whether torchrun started this process beside another, its rank 0, which holds the workspace."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def join_ranks() -> None:
    """Under torchrun, holds each rank until rank 0 has come here too: what it makes first is there then."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from nemo_minitron.models.ranks import join

        join("auto").broadcast(None)


def leave_ranks() -> None:
    """Under torchrun, ends the processes' connection in good order: none goes while another still talks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from nemo_minitron.models.ranks import leave

        leave()
