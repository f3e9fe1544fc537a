"""The stages by name."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_minitron.config.config import Config
    from nemo_minitron.stages.result import Result


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


def run_stage(name: str, config: "Config") -> "Result":
    """Runs one stage by its name."""
    result: Result = importlib.import_module(STAGES[name]).run(config)
    return result
