"""Keys of the stages that train, and of training itself."""

from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.stages.keys import key


@dataclass
class IntermediateConfig:
    """Losses on what lies between embedding and logits ([P1] section 3.2)."""

    terms: list[str] = key(
        [],
        "which: embedding (output of the embedding), hidden (output of a layer), mlp_input, attention "
        "(relations between queries, keys, values, as in MiniLMv2); empty: none, the papers' choice unless "
        "much depth was removed",
    )
    distance: str = key("cosine", "between hidden states; the first was best in [P1]", ("cosine", "mse"))
    layers: list[str] = key(
        ["-3:-3"], "teacher:student layers that are compared, 0-based, negative ones counted from the end"
    )
    relation_heads: int = key(8, "heads into which the relations of attention are split", least=1)
    alpha: float | None = key(
        None, "weight of their sum; null: at every step what makes it as large as the loss on logits"
    )


@dataclass
class CacheConfig:
    """What 'minitron logits' keeps of the teacher's logits."""

    method: str = key(
        "top_k",
        "the largest entries and the mass of all others, or entries drawn from the teacher's distribution, "
        "whose gradient is unbiased (arXiv 2503.16870)",
        ("top_k", "sampling"),
    )
    entries: int = key(64, "entries per token", least=1)
    batch_size: int = key(8, "samples per forward pass", least=1)
    seed: int = key(0, "seed of the draw")


@dataclass
class DistillConfig:
    """From the pruned model to the student ([P1] section 3)."""

    teacher: str | None = key(
        None, "model folder to distil from; null: the (corrected) model that was pruned"
    )
    teacher_place: str = key(
        "device",
        "where the teacher runs: on the student's device, split over the ranks as the student is "
        "(training.parallel=shard), or on the CPU",
        ("device", "shard", "cpu"),
    )
    teacher_dtype: str | None = key(
        None,
        "dtype of the teacher's weights; int8: eight bits for its projections, with a scale per output "
        "channel; null: as they are stored",
        ("float32", "bfloat16", "float16", "int8"),
    )
    teacher_logits: str = key(
        "online",
        "online: the teacher runs beside the student; cache: 'minitron logits' has run it once, and written "
        "a few entries per token",
        ("online", "cache"),
    )
    live_teacher: str | None = key(
        None,
        "folder WORKSPACE/live of another run, whose 'minitron correct' has correct.publish_every: its "
        "newest weights are the teacher's from the next step on",
    )
    cache: CacheConfig = field(default_factory=CacheConfig)
    kl: float = key(1.0, "weight of the divergence between teacher and student logits")
    divergence: str = key(
        "forward_kl",
        "which divergence; the first is the papers' choice",
        ("forward_kl", "reverse_kl", "jsd", "topk_kl", "mse", "cosine"),
    )
    beta: float = key(0.5, "beta of divergence=jsd, between 0 (exclusive) and 1 (exclusive)")
    top_k: int = key(100, "entries that divergence=topk_kl tells apart; one bucket holds the others", least=1)
    ce: float = key(0.0, "weight of the cross-entropy with the data")
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    temperature: float = key(1.0, "softmax temperature tau; the divergence carries the factor tau squared")
    chunk_tokens: int | None = key(
        None, "tokens whose logits exist at a time; null: chosen from the vocabulary"
    )
    batch_size: int = key(8, "samples per step and device, before trainer.accumulate_grad_batches", least=1)
    seed: int = key(0, "seed of the sample order")


@dataclass
class PretrainConfig:
    """Training from random weights: a small teacher, or the baseline of the student's shape."""

    enabled: bool = key(False, "whether 'minitron run' begins by training its own teacher")
    baseline: bool = key(
        False, "train the from-scratch baseline: the pruned model's shape on the student's tokens"
    )
    model: dict[str, Any] = key({}, "config.json of the model to train, as its family writes it")
    tokenizer: str | None = key(None, "folder of a tokenizer; null: train a byte-level BPE on data.train")
    batch_size: int = key(8, "samples per step and device", least=1)
    seed: int = key(0, "seed of the weights and the sample order")
    trainer: dict[str, Any] = key({}, "keys that replace those of trainer")
    optim: dict[str, Any] = key({}, "keys that replace those of optim")


@dataclass
class CorrectConfig:
    """Teacher correction: the unpruned model goes on training on the distillation data ([P2] section 2)."""

    enabled: bool = key(False, "whether 'minitron run' corrects the teacher before scoring it")
    publish_every: int | None = key(
        None, "steps after which the weights are put into live/, for distill.live_teacher", least=1
    )
    batch_size: int = key(8, "samples per step and device", least=1)
    seed: int = key(1, "seed of the sample order")
    trainer: dict[str, Any] = key({}, "keys that replace those of trainer")
    optim: dict[str, Any] = key({}, "keys that replace those of optim")


@dataclass
class TrainingConfig:
    """What every training shares, besides what Lightning and NeMo know."""

    max_tokens: int | None = key(
        None,
        "tokens to train on; sets trainer.max_steps, and the schedule with it, where the stage has no "
        "max_steps of its own",
        least=1,
    )
    validate_every: int | None = key(
        None,
        "steps between validations, however many micro-batches make a step; null: "
        "trainer.val_check_interval, which counts micro-batches",
        least=1,
    )
    parallel: str = key(
        "replicate",
        "under torchrun: a copy of the model on every rank (DDP), or its weights, gradients and optimiser "
        "state split over them (FSDP2)",
        ("replicate", "shard"),
    )
    tensor_parallel: int = key(
        1, "ranks that share the matrix products of each layer, with training.parallel=shard", least=1
    )
    activation_checkpointing: bool = key(
        False, "keep no activations inside layers, compute them again in the backward pass"
    )
    compile: bool = key(
        False, "torch.compile the layers, and what the loss computes between its matrix products"
    )
    transformer_engine: str = key(
        "off",
        "on: Transformer Engine's linear layers and norms in student and teacher; fp8: and their products in "
        "FP8 (CUDA, pip install nemo-minitron[te])",
        ("off", "on", "fp8"),
    )
    ema_decay: float | None = key(
        None,
        "decay of a moving average of the weights that is validated and becomes the result",
    )
    on_bad_loss: str = key(
        "stop",
        "what a loss or gradient that is not finite, or a spike, does: stop; or skip: go back to the last "
        "checkpoint and leave the batches of that step out",
        ("stop", "skip"),
    )
    spike_factor: float | None = key(
        None,
        "a loss this many times the median of the last spike_window steps is a spike; null: off",
    )
    spike_window: int = key(32, "steps whose losses make the median", least=2)
    max_skips: int = key(10, "steps that on_bad_loss=skip leaves out before it gives up", least=1)
    peak_tflops: float | None = key(
        None,
        "a device's peak in 1e12 FLOP/s, for the log's mfu; null: only of known cards",
    )
