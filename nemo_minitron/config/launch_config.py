"""Keys of ``launch``: where stages run and what they are allowed."""

from dataclasses import dataclass, field

from nemo_minitron.config.bounds import Bounds
from nemo_minitron.config.option import option


@dataclass
class SlurmConfig:
    """Jobs of a batch system."""

    nodes: int = option(1, "nodes of a job", least=1)
    options: list[str] = option(
        [], "further #SBATCH options, as in ['--partition=batch', '--gres=gpu:8']"
    )
    setup: list[str] = option([], "shell lines before the stage, as in ['module load cuda']")
    poll_seconds: float = option(15.0, "seconds between looks at the queue", least=0)


@dataclass
class LaunchConfig:
    """How 'minitron run' and the flows start a stage, and how they handle a failed one."""

    kind: str = option(
        "inline",
        "inline: in the flow's own process; subprocess: in one of its own; torchrun: in several on this "
        "machine; slurm: as a job of the batch system",
        ("inline", "subprocess", "torchrun", "slurm"),
    )
    processes: int | None = option(
        None,
        "processes per node of torchrun and slurm; null: one per GPU of this machine",
        bounds=Bounds(least=1, most=1_024),
    )
    stages: list[str] | None = option(
        None,
        "stages that launch.kind=torchrun and slurm apply to, the others run in a process of "
        "their own; null: all stages that several processes can share, and measure-layers as one process",
    )
    time_limit: float | None = option(
        None, "seconds that a stage may take; null: no limit", bounds=Bounds(above=0)
    )
    time_limits: dict[str, float] = option(
        {},
        "the same for single stages, as in +launch.time_limits.distill=86400",
        bounds=Bounds(above=0),
    )
    silence: float | None = option(
        3600.0,
        "seconds without output or progress after which a stage's process counts as hung; null: never",
        bounds=Bounds(above=0),
    )
    grace: float = option(60.0, "seconds that a stage's process has to save after SIGTERM", least=0)
    retries: int = option(
        4,
        "further tries after a failure that may pass: network, lost process, too little memory",
        bounds=Bounds(least=0, most=1_000),
    )
    retry_seconds: float = option(
        2.0,
        "wait before the second try; doubles with each up to five minutes, and is jittered",
        least=0,
    )
    accelerator: str | None = option(
        None,
        "name of the accelerator that a stage locks while it computes, such as gpu-0; flows on "
        "this machine with the same name wait for each other",
    )
    wait: float = option(0.0, "seconds to wait for a workspace that another run holds", least=0)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
