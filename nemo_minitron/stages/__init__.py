"""Floor 5: one file per arrow of the pipeline. Each has ``run(config) -> Result``.

They meet on disk, not in memory.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_minitron.stages.config import Config
    from nemo_minitron.stages.stage import Result

STAGES = {
    "download": "nemo_minitron.stages.download",
    "pretrain": "nemo_minitron.stages.pretrain",
    "correct": "nemo_minitron.stages.correct",
    "score": "nemo_minitron.stages.score",
    "plan": "nemo_minitron.stages.plan",
    "prune": "nemo_minitron.stages.prune",
    "logits": "nemo_minitron.stages.logits",
    "distill": "nemo_minitron.stages.distill",
    "evaluate": "nemo_minitron.stages.evaluate",
    "export": "nemo_minitron.stages.export",
}
"""Stage name, as on the command line, to its module; imported when it is run."""


SEVERAL = ("pretrain", "correct", "score", "logits", "distill", "evaluate")
"""Stages that share their work where torchrun starts several processes."""


def follows() -> bool:
    """Whether torchrun started this process beside another, its rank 0, which holds the workspace."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def meet() -> None:
    """Under torchrun, holds each rank until rank 0 has come here too: what it makes first is there then."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from nemo_minitron.bridge.ranks import join

        join("auto").broadcast(None)


def part() -> None:
    """Under torchrun, ends the processes' connection in good order: none goes while another still talks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from nemo_minitron.bridge.ranks import leave

        leave()


def run_stage(name: str, config: "Config") -> "Result":
    """Runs one stage by its name."""
    result: Result = importlib.import_module(STAGES[name]).run(config)
    return result
