"""Every key of the configuration: its type, its default and what it means.

The classes are the schema that Hydra composes against: a key that is not declared here is refused. Sections
that are handed on to Lightning and NeMo as they are (``trainer``, ``optim``, ``exp_manager``) are open
dictionaries whose defaults lie in configs/config.yaml; add keys to them with ``+``.
"""

from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.stages.keys import key
from nemo_minitron.stages.launch_config import LaunchConfig, TrackConfig
from nemo_minitron.stages.training_config import CorrectConfig, DistillConfig, PretrainConfig, TrainingConfig


@dataclass
class FamiliesConfig:
    """Family tables."""

    path: str | None = key(None, "table of your own (.yaml, docs/families.md), or a folder of them")


@dataclass
class SourceConfig:
    """The model to compress."""

    model: str | None = key(
        None, "hub id, local folder, or .nemo archive (of this package) of the model to compress"
    )
    revision: str | None = key(
        None,
        "hub revision; a workspace stays with the commit that it stood for when the workspace began",
    )


@dataclass
class TextConfig:
    """One set of text."""

    paths: list[str] | None = key(
        None,
        "files, folders, glob patterns, hf://owner/name[/config][:split]; null: see the section's own rule",
    )
    exclude: list[str] = key([], "glob patterns of files to leave out")
    format: str = key(
        "auto", "auto goes by the file name", ("auto", "text", "jsonl", "parquet", "hf", "megatron")
    )
    text_key: str = key(
        "text",
        "column that holds the text, or a conversation (messages with role and content), in jsonl, parquet "
        "and hf",
    )
    sequence_length: int = key(1024, "tokens per sample; documents are packed end to end", least=1)
    samples: int | None = key(None, "samples to take; null: as many as are needed", least=1)
    seed: int = key(0, "seed of the order in which files and samples are taken")


@dataclass
class CalibrationConfig(TextConfig):
    """Text for scoring."""

    samples: int | None = key(1024, "samples to take; null: all of them", least=1)
    weights: list[float] | None = key(
        None, "shares of the samples, one for each entry of paths; null: all text is one pool"
    )
    packing: str = key(
        "plain",
        "plain: documents end to end, as in the papers; documents: the same, but attention and positions "
        "begin anew with each document; off: one document per sample, cut or padded",
        ("plain", "documents", "off"),
    )


@dataclass
class TrainConfig(TextConfig):
    """Text for training; its tokens lie in the workspace's tokens/, made once for all stages."""

    weights: list[float] | None = key(
        None, "shares of the samples, one for each entry of paths; null: all text is one pool"
    )
    learn_from: str = key(
        "all",
        "which tokens count in the loss: all, or answers: of a conversation only what the assistant says",
        ("all", "answers"),
    )


@dataclass
class DataConfig:
    """Text for scoring, training and measuring."""

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: TextConfig = field(default_factory=TextConfig)
    holdout: float = key(
        0.05,
        "share of data.train's documents kept out of training, for validation without paths of its own",
    )


@dataclass
class AggregationConfig:
    """How activations become one number per unit ([P1] section 2.2)."""

    batch: str = key("l2", "aggregation over samples", ("l2", "mean", "var"))
    sequence: str = key(
        "mean", "aggregation over the positions of a sample, done first", ("l2", "mean", "var")
    )
    also: list[str] = key(
        [], "further aggregations over positions, summed in the same pass and stored beside the first"
    )


@dataclass
class ScoreConfig:
    """Importance of channels, heads, neurons, experts and layers."""

    importance: str = key("activation", "what the ranking rests on", ("activation", "magnitude", "random"))
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    neurons: str = key(
        "post_activation",
        "where the neurons of dense and shared MLPs are read: at the input of the down projection, or at the "
        "output of the up projection",
        ("post_activation", "pre_activation"),
    )
    depth: str = key(
        "block_influence", "how layers are ranked", ("block_influence", "lm_loss", "task", "none")
    )
    blocks: list[int] = key(
        [],
        "lengths of blocks of consecutive layers to measure besides single layers; plan.layers with "
        "plan.layer_choice=contiguous adds its own",
    )
    tasks: list[str] = key([], "lm-eval tasks of score.depth=task, as in evaluate.tasks")
    task_limit: int | None = key(None, "documents per task; null: all", least=1)
    iterations: int = key(
        1, "rounds of score and cut on the way to the plan's widths; 1: score the whole model once", least=1
    )
    batch_size: int = key(8, "samples per forward pass", least=1)
    device: str = key("auto", "auto, cpu, cuda, cuda:1 ...")
    seed: int = key(0, "seed of the random baseline")
    streaming: str = key(
        "auto",
        "one layer's weights in memory at a time; auto: where the model does not fit",
        ("auto", "on", "off"),
    )
    activation_budget: int = key(
        2_000_000_000, "bytes of hidden states that streaming keeps in memory; the rest goes to disk", least=0
    )
    parallel: str = key(
        "replicate",
        "under torchrun: a copy of the model on every rank, or its layers sharded over them (FSDP2)",
        ("replicate", "shard"),
    )
    shard: str | None = key(None, "score only part i of n of the samples, as in 2/4; to be merged")
    merge: list[str] = key([], "workspaces with the parts: their scores are added up, nothing is run")
    save_seconds: float = key(60.0, "how often the sums so far are saved", least=0)


@dataclass
class BudgetConfig:
    """A search instead of target sizes ([P1] section 4.3)."""

    params: float | None = key(None, "how large the model may be; null: no search", least=1)
    tolerance: float = key(0.05, "how far from that a candidate may be, relatively", least=0)
    measure: str = key(
        "parameters",
        "what params counts",
        ("parameters", "non_embedding", "active", "kv_bytes_per_token", "flops_per_token"),
    )
    choices: dict[str, list[float]] = key(
        {},
        "sizes to choose from, as in +plan.budget.choices.hidden=[2560,3072]; expansion stands for ffn / "
        "hidden; none: a grid around the share that is asked for",
    )
    candidates: int = key(8, "candidates to try, those nearest to params", least=1)
    steps: int = key(400, "steps of distillation of the last round", least=1)
    factor: int = key(2, "share of the candidates that goes on to the next round, 1 in so many", least=2)


@dataclass
class PlanConfig:
    """Target sizes; null keeps an axis as it is."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)

    hidden: int | None = key(None, "width of the residual stream")
    ffn: int | None = key(None, "neurons of the dense MLP, per layer")
    heads: int | None = key(None, "query heads, per layer")
    kv_heads: int | None = key(None, "key/value heads (whole groups), per layer")
    experts: int | None = key(None, "routed experts, per layer")
    expert_ffn: int | None = key(None, "neurons inside a routed expert")
    shared_ffn: int | None = key(None, "neurons of a shared expert")
    mamba_heads: int | None = key(None, "Mamba heads, per layer")
    mamba_groups: int | None = key(None, "groups of Mamba heads (whole groups), per layer")
    mamba_head_dim: int | None = key(None, "channels of every Mamba head, the same in all heads of a layer")
    mamba_state: int | None = key(None, "state size of the Mamba layers")
    layers: int | None = key(None, "layers")
    drop_layers: list[int] | None = key(None, "0-based layers to drop, instead of plan.layers")
    layer_choice: str | None = key(
        None,
        "which layers go: the least important wherever they are (scattered, also null), the best block of "
        "consecutive ones, or one after the other with all others measured anew",
        ("scattered", "contiguous", "greedy"),
    )


@dataclass
class PruneConfig:
    """How the pruned checkpoint is written."""

    shard_size: int = key(5_000_000_000, "largest shard in bytes", least=1)
    also: list[str] = key(
        [], "further workspaces with a plan for the same model: pruned in the same pass over its weights"
    )


@dataclass
class EvaluateConfig:
    """What is measured, and the gate before export."""

    tasks: list[str] = key(
        [],
        "lm-eval tasks by name, with @ and the number of examples before each question where it is not the "
        "task's own (arc_challenge@25); held_out_choice and held_out_bytes are made from the validation text",
    )
    task_dir: str | None = key(None, "folder with own lm-eval task YAMLs")
    task_limit: int | None = key(None, "documents per task; null: all", least=1)
    model: str | None = key(
        None,
        "folder of a model, such as an earlier export, to measure against source.model; null: what this "
        "workspace pruned and distilled",
    )
    from_scratch: bool = key(
        False, "also train and measure a model of the student's shape from random weights"
    )
    min_retention: float | None = key(
        None, "least allowed share of the teacher's quality (teacher perplexity / student perplexity), 0 to 1"
    )
    floors: list[str] = key(
        [],
        "TASK:METRIC:VALUE each: what the student must reach (or stay under, where less is better) to go out",
    )
    previous: str | None = key(None, "folder of an earlier export that the student must not fall behind")
    max_regression: float = key(
        0.02, "how far, relatively, the student may fall behind evaluate.previous in any measure", least=0
    )
    batch_size: int = key(8, "samples per forward pass", least=1)
    prompts: int = key(16, "held-out beginnings that every model goes on writing; 0: none", least=0)
    written_tokens: int = key(64, "tokens that it writes, behind as many of the text", least=1)
    speed: bool = key(True, "measure tokens per second and peak memory, each model in a process of its own")
    speed_batches: list[int] = key([1, 8], "samples at a time in the speed measurement")
    prompt_tokens: int = key(256, "prompt length of the speed measurement", least=1)
    contexts: list[int] = key([], "further prompt lengths of the speed measurement")
    new_tokens: int = key(64, "generated tokens of the speed measurement", least=1)
    device: str = key("auto", "auto, cpu, cuda, cuda:1 ...")


@dataclass
class ExportConfig:
    """The Hugging Face folder that goes out."""

    dtype: str | None = key(
        None, "dtype of the weights; null: the source's", ("float32", "bfloat16", "float16")
    )
    license: str | None = key(None, "licence id on the model card; null: the source's, where it names one")
    name: str | None = key(None, "title of the model card; null: made from the source and its new size")
    shard_size: int = key(5_000_000_000, "largest shard in bytes", least=1)
    push_to_hub: str | None = key(None, "hub repository to upload to (private unless export.public)")
    public: bool = key(False, "make the hub repository public")
    revision: str | None = key(None, "branch of the hub repository to upload to; made where there is none")
    tag: str | None = key(None, "tag that the upload gets")
    force: bool = key(False, "export although the quality gate failed; the model card says so")
    nemo: bool = key(False, "also write the model as a .nemo archive, beside the export's folder")


@dataclass
class Config:
    """The whole configuration of a run."""

    workspace: str = key("runs/default", "folder of the run; every artifact lies below it")
    families: FamiliesConfig = field(default_factory=FamiliesConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    trainer: dict[str, Any] = key({}, "arguments of Lightning's Trainer")
    optim: dict[str, Any] = key({}, "NeMo optimiser and scheduler")
    exp_manager: dict[str, Any] = key({}, "NeMo's exp_manager; its folders are set by the stage")
