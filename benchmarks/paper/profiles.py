"""How large an experiment is: models, text, steps and seeds of each profile."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Profile:
    """One scale at which all experiments run.

    Attributes:
        name: as on the command line.
        seeds: teachers, each with a data order of its own.
        steps: of distillation, where few variants are compared.
        short: the same, where many are.
        most: largest multiple of ``steps`` that a model trains on from scratch.
        correction: steps of teacher correction.
        words: overrides of all stages: text, batches, schedule, device.
        models: config.json of the teachers, by family.
        sizes: what is cut to, by name: ``width``, ``depth`` and ``both`` have the same number of
            parameters to a percent; ``glu`` holds the sizes of the llama teacher, each cut alone.
        questions: of the multiple-choice task made from held-out text.
    """

    name: str
    seeds: int
    steps: int
    short: int
    most: int
    correction: int
    words: tuple[str, ...]
    models: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, Sizes]
    questions: int


def _models(vocab: int, hidden: int, layers: int, ffn: int, glu: int, **heads: int) -> Any:
    """A Nemotron (squared ReLU, LayerNorm, as in [P1]) and a Llama (gated, RMSNorm) of these sizes."""
    common = {
        "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, **heads,
        "max_position_embeddings": 1024, "initializer_range": 0.02, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "nemotron": {
            **common, "model_type": "nemotron", "intermediate_size": ffn, "hidden_act": "relu2",
            "norm_eps": 1e-5, "rope_parameters": {**rope, "partial_rotary_factor": 0.5},
        },
        "llama": {
            **common, "model_type": "llama", "intermediate_size": glu, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_parameters": rope,
        },
    }  # fmt: skip


def _words(
    length: int, batch: int, teacher_steps: int, samples: int, rate: float = 2e-3
) -> tuple[str, ...]:
    return (
        *(f"data.{text}.sequence_length={length}" for text in ("train", "calibration", "validation")),
        f"data.calibration.samples={samples}", f"data.validation.samples={samples}",
        f"pretrain.batch_size={batch}", f"distill.batch_size={batch}", f"correct.batch_size={batch}",
        f"pretrain.trainer.max_steps={teacher_steps}", f"pretrain.trainer.val_check_interval={teacher_steps}",
        f"pretrain.optim.lr={1.5 * rate}", f"correct.optim.lr={1.5 * rate / 5}", f"optim.lr={rate}", f"optim.sched.min_lr={rate / 20}",
        f"pretrain.optim.sched.warmup_steps={max(1, teacher_steps // 10)}",
        "trainer.enable_progress_bar=false", "evaluate.speed=false", "evaluate.tasks=[]",
    )  # fmt: skip


_SMALL = _models(
    512, 64, 6, 256, 176, num_attention_heads=8, num_key_value_heads=4, head_dim=16
)  # 0.41 M parameters
_SMALL_SIZES: Mapping[str, Sizes] = {
    "width": {"hidden": 48, "heads": 4, "ffn": 200},
    "depth": {"layers": 3},
    "both": {"hidden": 56, "heads": 4, "ffn": 192, "layers": 5},
    "ffn": {"ffn": 128},
    "heads": {"heads": 4},
    "quarter": {"hidden": 32, "heads": 4, "ffn": 96, "layers": 4},
    "glu": {"ffn": 88, "heads": 4, "hidden": 48, "layers": 4},
}

PROFILES = {
    "smoke": Profile(
        "smoke", 1, 6, 4, 2, 4, _words(32, 4, 12, 8), _SMALL, _SMALL_SIZES, 8
    ),
    "quick": Profile(
        "quick", 3, 120, 60, 40, 100, _words(64, 16, 600, 128), _SMALL, _SMALL_SIZES, 200
    ),
    "night": Profile(
        "night", 5, 300, 150, 40, 300, _words(128, 16, 1500, 256),
        _models(1024, 128, 6, 512, 352, num_attention_heads=8, num_key_value_heads=4, head_dim=16),
        {
            "width": {"hidden": 96, "heads": 4, "ffn": 400},
            "depth": {"layers": 3},
            "both": {"hidden": 112, "heads": 4, "ffn": 384, "layers": 5},
            "ffn": {"ffn": 256},
            "heads": {"heads": 4},
            "quarter": {"hidden": 64, "heads": 4, "ffn": 192, "layers": 4},
            "glu": {"ffn": 176, "heads": 4, "hidden": 96, "layers": 4},
        },
        200,
    ),
    "gpu": Profile(
        "gpu", 3, 400, 200, 40, 400,
        (
            *_words(512, 32, 4000, 256, 6e-4), "trainer.accelerator=gpu", "trainer.precision=bf16-mixed",
            "score.device=cuda",
        ),
        _models(8192, 768, 14, 3072, 2048, num_attention_heads=12, num_key_value_heads=4, head_dim=64),
        {
            "width": {"hidden": 576, "heads": 8, "ffn": 2176},
            "depth": {"layers": 7},
            "both": {"hidden": 672, "heads": 8, "ffn": 2624, "layers": 10},
            "ffn": {"ffn": 1536},
            "heads": {"heads": 8},
            "quarter": {"hidden": 384, "heads": 8, "ffn": 1152, "layers": 9},
            "glu": {"ffn": 1024, "heads": 8, "hidden": 576, "layers": 9},
        },
        400,
    ),
}  # fmt: skip
"""``gpu``: teachers of 100 M parameters; ``--minutes 8`` ends a piece, the next call goes on."""
