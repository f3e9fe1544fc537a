"""Which experts go: loss of a trained mixture after a cut of its experts, at once and after a short distillation.

Experts by the mean over their own tokens (REAP), by the mean over all tokens, by magnitude and by chance. The mixture
(16 experts in each of 4 layers, 4 for each token) is trained on the standard library, one per seed; it stays in runs/experts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.demo_teacher import loss
from benchmarks.duel import RESULTS
from nemo_minitron.config.compose import load_config
from nemo_minitron.config.config import Config
from nemo_minitron.evaluation.report import markdown
from nemo_minitron.stages.run import run_stage

ROOT = Path("runs/experts")
MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256,
    "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}  # fmt: skip
RANKINGS = {
    "own tokens": ["score.experts=own_tokens"],
    "all tokens": ["score.experts=all_tokens"],
    "magnitude": ["score.importance=magnitude"],
    "random": ["score.importance=random"],
}
TEACHER_STEPS = 500


def teacher(seed: int) -> Config:
    """Trains the mixture of a seed, unless it is there."""
    config = load_config(
        "demo",
        [
            f"workspace={ROOT}/teacher-{seed}", f"pretrain.seed={seed}",
            f"pretrain.trainer.max_steps={TEACHER_STEPS}", "pretrain.trainer.val_check_interval=100",
        ],
    )  # fmt: skip
    config.pretrain.model = MODEL
    run_stage("pretrain", config)
    return config


def student(seed: int, experts: int, steps: int, words: list[str]) -> tuple[float, float]:
    """Held-out loss right after a cut, and after a distillation of so many steps."""
    config = load_config(
        "demo",
        [
            f"workspace={ROOT}/cut-{seed}", f"source.model={ROOT}/teacher-{seed}/pretrain/hf",
            "pretrain.enabled=false", *(f"plan.{name}=null" for name in ("hidden", "ffn", "heads")),
            f"plan.experts={experts}", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
            f"score.seed={seed}", f"distill.seed={seed}", "score.depth=none", *words,
        ],
    )  # fmt: skip
    for stage in ("download", "score", "plan", "prune"):
        run_stage(stage, config)
    at_once = loss(config, Path(config.workspace) / "pruned")
    run_stage("distill", config)
    return at_once, loss(config, Path(config.workspace) / "student" / "hf")


def main() -> None:
    """Cuts by all rankings of all seeds, and prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=100)
    args = arguments.parse_args()
    seeds = range(args.seeds)
    whole = [loss(teacher(seed), ROOT / f"teacher-{seed}" / "pretrain" / "hf") for seed in seeds]
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for experts in (12, 8):
        cut = f"experts 16 to {experts}"
        found[cut] = {}
        for name, words in RANKINGS.items():
            found[cut][name] = [student(seed, experts, args.steps, words) for seed in seeds]
            print(cut, name, found[cut][name], flush=True)
    rows = [("teacher", "", *(text for one in whole for text in (f"{one:.3f}", "")))]
    rows += [
        (cut, name, *(f"{value:.3f}" for pair in pairs for value in pair))
        for cut, rankings in found.items()
        for name, pairs in rankings.items()
    ]
    titles = [f"seed {seed}, {when}" for seed in seeds for when in ("at once", "distilled")]
    print(
        f"held-out loss right after the cut, and after {args.steps} steps of distillation\n\n"
        f"{markdown(('cut', 'ranking', *titles), tuple(rows))}"
    )
    RESULTS.mkdir(exist_ok=True)
    written = {"steps": args.steps, "teacher": whole, "cuts": found}
    (RESULTS / "experts.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
