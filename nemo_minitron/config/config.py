"""Every key of the configuration: its type, its default and what it means.

The classes are the schema that Hydra composes against: a key that is not declared here is refused.
Sections that are handed on to Lightning and NeMo as they are (``trainer``, ``optim``,
``exp_manager``) are open dictionaries whose defaults lie in configs/config.yaml; add keys to them
with ``+``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.config.cascade_config import CascadeConfig
from nemo_minitron.config.correct_config import CorrectConfig
from nemo_minitron.config.data_config import DataConfig
from nemo_minitron.config.distill_config import DistillConfig
from nemo_minitron.config.evaluate_config import EvaluateConfig
from nemo_minitron.config.export_config import ExportConfig
from nemo_minitron.config.families_config import FamiliesConfig
from nemo_minitron.config.launch_config import LaunchConfig
from nemo_minitron.config.option import option
from nemo_minitron.config.plan_config import PlanConfig
from nemo_minitron.config.pretrain_config import PretrainConfig
from nemo_minitron.config.prune_config import PruneConfig
from nemo_minitron.config.score_config import ScoreConfig
from nemo_minitron.config.source_config import SourceConfig
from nemo_minitron.config.track_config import TrackConfig
from nemo_minitron.config.training_config import TrainingConfig


@dataclass
class Config:
    """The whole configuration of a run."""

    workspace: str = option("runs/default", "folder of the run; every artifact lies below it")
    families: FamiliesConfig = field(default_factory=FamiliesConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    trainer: dict[str, Any] = option({}, "arguments of Lightning's Trainer")
    optim: dict[str, Any] = option({}, "NeMo optimiser and scheduler")
    exp_manager: dict[str, Any] = option(
        {}, "NeMo's exp_manager; its folders are set by the stage (docs/nemo.md)"
    )


def workspace_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.workspace)
