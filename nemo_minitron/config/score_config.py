"""Keys of ``score``."""

from dataclasses import dataclass, field

from nemo_minitron.config.bounds import ANY_SEED, Bounds
from nemo_minitron.config.option import option

USUAL_BATCH = 8
"""Samples at once on a CPU, where a layer is in memory at a time, and where ranks share a model."""


@dataclass
class AggregationConfig:
    """How activations become one number per unit ([P1] section 2.2)."""

    batch: str = option("l2", "aggregation over samples", ("l2", "mean", "var"))
    sequence: str = option(
        "mean", "aggregation over the positions of a sample, done first", ("l2", "mean", "var")
    )
    also: list[str] = option(
        [],
        "further aggregations over positions, summed in the same pass and stored beside the first",
    )


@dataclass
class ScoreConfig:
    """Importance of channels, heads, neurons, experts and layers."""

    importance: str = option(
        "activation", "how units are ranked", ("activation", "magnitude", "random")
    )
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    experts: str = option(
        "all_tokens",
        "what a routed expert's weighted outputs are averaged over, with importance=activation: the tokens "
        "that came to it (REAP, whatever aggregation says), or all tokens, where it gave the others 0",
        ("own_tokens", "all_tokens"),
    )
    neurons: str = option(
        "post_activation",
        "where the neurons of dense and shared MLPs are read: at the input of the down projection, or at the "
        "output of the up projection",
        ("post_activation", "pre_activation"),
    )
    depth: str = option(
        "block_influence", "how layers are ranked", ("block_influence", "lm_loss", "task", "none")
    )
    blocks: list[int] = option(
        [],
        "lengths of blocks of consecutive layers to measure besides single layers; plan.layers with "
        "plan.layer_choice=contiguous adds its own",
        least=1,
    )
    tasks: list[str] = option([], "lm-eval tasks of score.depth=task, as in evaluate.tasks")
    task_limit: int | None = option(None, "documents per task; null: all", least=1)
    iterations: int = option(
        1,
        "rounds of score and cut on the way to the plan's widths; 1: score the whole model once",
        bounds=Bounds(least=1, most=1_000),
    )
    batch_size: int | str = option(
        "auto",
        "samples per forward pass, fewer where a GPU's memory runs out; auto: what takes 60% of its free "
        "memory, up to 65,536 tokens, and 8 on a CPU, layer by layer and with score.parallel=shard",
        bounds=Bounds(least=1, most=16_384),
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    seed: int = option(0, "seed of the random baseline", bounds=ANY_SEED)
    streaming: str = option(
        "auto",
        "one layer's weights in memory at a time; auto: where the model does not fit",
        ("auto", "on", "off"),
    )
    activation_budget: int = option(
        2_000_000_000,
        "bytes of hidden states that streaming keeps in memory; the rest goes to disk",
        least=0,
    )
    parallel: str = option(
        "replicate",
        "under torchrun: a copy of the model on every rank, or its layers sharded over them (FSDP2)",
        ("replicate", "shard"),
    )
    shard: str | None = option(
        None, "score only part i of n of the samples, as in 2/4; to be merged"
    )
    merge: list[str] = option(
        [], "workspaces with the parts: their scores are added up, nothing is run"
    )
    save_seconds: float = option(60.0, "how often the sums so far are saved", least=0)
