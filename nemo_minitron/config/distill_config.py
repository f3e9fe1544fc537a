"""Keys of ``distill``."""

from dataclasses import dataclass, field

from nemo_minitron.config.bounds import ANY_SEED, Bounds
from nemo_minitron.config.option import option


@dataclass
class IntermediateConfig:
    """Losses on hidden states and attention inside the models ([P1] section 3.2)."""

    terms: list[str] = option(
        [],
        "which: embedding (output of the embedding), hidden (output of a layer), mlp_input, attention "
        "(relations between queries, keys, values, as in MiniLMv2); empty: none, as in the papers "
        "(arXiv 2407.14679) unless much depth was removed",
    )
    distance: str = option(
        "cosine",
        "between hidden states; cosine was best in the paper (arXiv 2407.14679)",
        ("cosine", "mse"),
    )
    layers: list[str] = option(
        ["-3:-3"],
        "teacher:student layers that are compared, 0-based, negative ones counted from the end",
    )
    relation_heads: int = option(
        8, "heads into which the relations of attention are split", least=1
    )
    alpha: float | None = option(
        None,
        "weight alpha of the intermediate losses; null: L_logits / L_is at every step",
        least=0,
    )


@dataclass
class CacheConfig:
    """What 'minitron logits' keeps of the teacher's logits."""

    method: str = option(
        "top_k",
        "the largest entries and the mass of all others, or entries drawn from the teacher's distribution, "
        "whose gradient is unbiased (arXiv 2503.16870)",
        ("top_k", "sampling"),
    )
    entries: int = option(64, "entries per token", least=1)
    batch_size: int = option(8, "samples per forward pass", bounds=Bounds(least=1, most=16_384))
    seed: int = option(0, "seed of the draw", bounds=ANY_SEED)


@dataclass
class DistillConfig:
    """Distillation of the pruned model from its teacher ([P1] section 3)."""

    teacher: str | None = option(
        None,
        "model folder or GGUF file to distil from; null: the (corrected) model that was pruned",
    )
    teacher_place: str = option(
        "device",
        "where the teacher lies and runs: on the student's device, split over the ranks as the student is "
        "(training.parallel=shard), in the machine's memory with its layers copied to the device one by one "
        "while it runs there (offload), or wholly on the CPU",
        ("device", "shard", "offload", "cpu"),
    )
    teacher_dtype: str | None = option(
        None,
        "dtype of the teacher's weights; int8: eight bits for its projections, which saves memory and takes "
        "time; fp8: projections multiplied in eight bits, which saves both and needs a CUDA device of "
        "compute capability 8.9 or more; null: as they are stored",
        ("float32", "bfloat16", "float16", "int8", "fp8"),
    )
    teacher_logits: str = option(
        "online",
        "online: the teacher runs beside the student; cache: 'minitron logits' has run it once, and written "
        "a few entries per token",
        ("online", "cache"),
    )
    live_teacher: str | None = option(
        None,
        "folder WORKSPACE/live of another run, whose 'minitron correct' has correct.publish_every: its "
        "newest weights are the teacher's from the next step on",
    )
    cache: CacheConfig = field(default_factory=CacheConfig)
    outside: str = option(
        "renormalise",
        "what the teacher gives to entries that plan.vocab took from the student: its distribution is taken "
        "over the others (renormalise), and where tail is asked for, a token counts by their share of it",
        ("renormalise", "tail"),
    )
    kl: float = option(1.0, "weight of the divergence between teacher and student logits", least=0)
    divergence: str = option(
        "forward_kl",
        "which divergence; forward_kl is the choice of the papers (arXiv 2407.14679)",
        ("forward_kl", "reverse_kl", "jsd", "topk_kl", "mse", "cosine"),
    )
    beta: float = option(
        0.5,
        "beta of divergence=jsd, between 0 (exclusive) and 1 (exclusive)",
        bounds=Bounds(above=0, below=1),
    )
    top_k: int = option(
        100, "entries that divergence=topk_kl tells apart; one bucket holds the others", least=1
    )
    ce: float = option(0.0, "weight of the cross-entropy with the data", least=0)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    temperature: float = option(
        1.0,
        "softmax temperature tau; the divergence carries the factor tau squared",
        bounds=Bounds(above=0),
    )
    stop_after: int | None = option(
        None,
        "ends the training after so many steps, with learning rate and samples as if it took all; the "
        "student can be measured, and a longer one resumes from it",
        least=1,
    )
    go_on_from: str | None = option(
        None,
        "folder WORKSPACE/student of a distillation of the same recipe with stop_after; where the recipe is "
        "another one, the training starts over, with a note",
    )
    chunk_tokens: int | None = option(
        None, "tokens whose logits exist at a time; null: chosen from the vocabulary", least=1
    )
    batch_size: int = option(
        8,
        "samples per step and device, before trainer.accumulate_grad_batches",
        bounds=Bounds(least=1, most=16_384),
    )
    seed: int = option(0, "seed of the sample order", bounds=ANY_SEED)
