"""Keys of ``plan``."""

from dataclasses import dataclass, field

from nemo_minitron.config.bounds import SHARE, Bounds
from nemo_minitron.config.option import option

NUMBERS = ("float32", "bfloat16", "float16", "float8", "int8", "int4")


@dataclass
class BudgetConfig:
    """A search instead of target sizes ([P1] section 4.3).

    A target (params) and upper bounds can be combined; a search is made where one of them is set.
    """

    params: float | None = option(
        None, "target of the search, in the unit of measure; null: no target", least=1
    )
    tolerance: float = option(
        0.05, "largest relative distance of a candidate from params", bounds=SHARE
    )
    measure: str = option(
        "parameters",
        "what params counts",
        ("parameters", "non_embedding", "active", "kv_bytes_per_token", "flops_per_token"),
    )
    parameters: float | None = option(None, "at most so many parameters", least=1)
    active: float | None = option(
        None, "at most so many parameters that one token meets (of the routed experts, those it is sent to)",
        least=1,
    )  # fmt: skip
    non_embedding: float | None = option(
        None, "at most so many parameters without embeddings and head", least=1
    )
    weight_bytes: float | None = option(None, "at most so many bytes of weights, at dtype", least=1)
    memory_bytes: float | None = option(
        None, "at most so many bytes of weights and KV cache, at dtype, cache_dtype, batch and context",
        least=1,
    )  # fmt: skip
    kv_bytes_per_token: float | None = option(
        None, "at most so many bytes of KV cache for a token, at cache_dtype", least=1
    )
    flops_per_token: float | None = option(
        None, "at most so many forward FLOPs for a token, at the mean position of context", least=1
    )
    latency_ms: float | None = option(
        None, "at most so many milliseconds for a pass of phase, by the table of minitron measure-layers",
        bounds=Bounds(above=0),
    )  # fmt: skip
    speedup: float | None = option(
        None, "a pass of phase at least so many times as fast as the source's, by the same table",
        bounds=Bounds(above=1),
    )  # fmt: skip
    dtype: str = option("bfloat16", "dtype of the weights that the bounds count", NUMBERS)
    cache_dtype: str = option("bfloat16", "dtype of the KV cache that the bounds count", NUMBERS)
    batch: int = option(1, "sequences at a time, for memory_bytes and latency", least=1)
    context: int = option(
        4096, "tokens of each sequence, for memory_bytes, flops_per_token and latency", least=1
    )
    phase: str = option(
        "decode",
        "the pass that latency counts: one token for each sequence behind context others (decode), or a "
        "whole prompt of context tokens (prefill)",
        ("decode", "prefill"),
    )
    layer_times: str | None = option(
        None,
        "table of minitron measure-layers, as of another workspace or machine; null: measured here where "
        "a bound asks for it",
    )
    choices: dict[str, list[float]] = option(
        {},
        "sizes to choose from, as in +plan.budget.choices.hidden=[2560,3072]; expansion stands for ffn / "
        "hidden; none: a grid around the share that is asked for",
        bounds=Bounds(above=0),
    )
    screened: int = option(
        48,
        "candidates to measure in memory, as they are cut, of which the best are distilled; 0: none, those "
        "nearest to params are",
        least=0,
    )
    screen_samples: int = option(
        64, "held-out samples that a candidate is screened on, at most all there are", least=1
    )
    tasks: list[str] = option(
        [],
        "lm-eval tasks that candidates are measured on besides the held-out loss, as in evaluate.tasks",
    )
    task_limit: int = option(100, "documents of a task while screening", least=1)
    metric: str = option(
        "loss",
        "what decides which candidates advance, when screened and after each round: loss, or TASK or "
        "TASK:METRIC of lm-eval",
    )
    candidates: int = option(8, "candidates to distil, the best of those screened", least=1)
    steps: int = option(400, "steps of distillation of the last round", least=1)
    continued: bool = option(
        False,
        "whether a round is the beginning of a candidate's whole training, at its learning rates, from which "
        "the next round and the winner resume; else each is a short training of its own, whose rate falls to "
        "its end",
    )
    factor: int = option(
        2, "a round keeps 1 in this many candidates: 2 keeps the better half", least=2
    )


@dataclass
class PlanConfig:
    """Target sizes; null keeps an axis as it is."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)

    hidden: int | None = option(None, "width of the residual stream", least=1)
    ffn: int | None = option(None, "neurons of the dense MLP, per layer", least=1)
    heads: int | None = option(None, "query heads, per layer", least=1)
    kv_heads: int | None = option(None, "key/value heads (whole groups), per layer", least=1)
    experts: int | None = option(None, "routed experts, per layer", least=1)
    experts_per_token: int | None = option(
        None, "experts that the router sends a token to; takes no scores", least=1
    )
    expert_ffn: int | None = option(None, "neurons inside a routed expert", least=1)
    shared_ffn: int | None = option(None, "neurons of a shared expert", least=1)
    mamba_heads: int | None = option(None, "Mamba heads, per layer", least=1)
    mamba_groups: int | None = option(
        None, "groups of Mamba heads (whole groups), per layer", least=1
    )
    mamba_head_dim: int | None = option(
        None, "channels of every Mamba head, the same in all heads of a layer", least=1
    )
    mamba_state: int | None = option(None, "state size of the Mamba layers", least=1)
    linear_key_heads: int | None = option(
        None, "key heads of gated delta nets (whole groups of value heads), per layer", least=1
    )
    linear_value_heads: int | None = option(
        None, "value heads of gated delta nets, per layer", least=1
    )
    layers: int | None = option(None, "layers", least=1)
    vocab: int | None = option(
        None,
        "entries of the vocabulary: those that the calibration text uses most, and all that any text needs; "
        "rounded up to a multiple of 128",
        least=1,
    )
    vocab_coverage: float | None = option(
        None,
        "instead: as few entries as make this share of the calibration text's tokens, as in 0.9995",
        bounds=Bounds(above=0, most=1),
    )
    serve: list[str] = option(
        [],
        "runtimes whose sizes a plan and a search keep to: gguf (rows of 256 for K-quants), fp8_block "
        "(blocks of 128), tp:N (heads and neurons divided among N ranks)",
    )
    head_merge: str = option(
        "none",
        "what query heads that go leave in one of their KV group that stays: nothing; twice its query "
        "projection less theirs, as printed (paper); their output projection added to its own (sum_output); "
        "that, and the mean of the query projections (average_query)",
        ("none", "paper", "sum_output", "average_query"),
    )
    drop_layers: list[int] | None = option(
        None, "0-based layers to drop, instead of plan.layers", least=0
    )
    layer_choice: str | None = option(
        None,
        "which layers go: the least important wherever they are (scattered, also null), the best block of "
        "consecutive ones, or one after the other with all others measured again",
        ("scattered", "contiguous", "greedy"),
    )
    mtp: str | None = option(
        None,
        "multi-token prediction layers of the source: left out (drop, also null), or cut along into the "
        "export (keep), which is refused where no table describes them",
        ("drop", "keep"),
    )
