"""This process among those that torchrun started, without importing torch."""

import os


def is_follower() -> bool:
    """Whether torchrun started this process and it is not rank 0, which holds the workspace."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0
