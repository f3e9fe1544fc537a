"""What ways of teaching are worth: one pruned model, the same samples and steps, taught in different ways.

Losses on hidden states, a mix with cross-entropy, and teachers of whom a few entries per token lie on disk,
each against forward KL from the teacher beside the student. The teacher is trained on the standard library and
stays in runs/paper.
"""

import argparse
import json
from pathlib import Path

from benchmarks.duel import RESULTS
from benchmarks.importance import ROOT, loss, teacher
from nemo_minitron.artifacts.log import read_log
from nemo_minitron.artifacts.report import markdown
from nemo_minitron.compose import load_config
from nemo_minitron.stages import run_stage

CACHE = ["distill.teacher_logits=cache"]
WAYS: dict[str, list[str]] = {
    "forward KL": [],
    "forward KL + 0.1 cross-entropy": ["distill.ce=0.1"],
    "forward KL + hidden, embedding": ["distill.intermediate.terms=[hidden,embedding]"],
    "forward KL + all intermediate": [
        "distill.intermediate.terms=[hidden,embedding,mlp_input,attention]",
    ],
    "cache, top 8": [*CACHE, "distill.cache.entries=8"],
    "cache, top 64": [*CACHE, "distill.cache.entries=64"],
    "cache, 8 drawn": [*CACHE, "distill.cache.method=sampling", "distill.cache.entries=8"],
    "cache, 64 drawn": [*CACHE, "distill.cache.method=sampling", "distill.cache.entries=64"],
}


def taught(seed: int, steps: int, words: list[str]) -> dict[str, float]:
    """Held-out loss of the student, and what the cache takes."""
    source = ROOT / f"teacher-{seed}" / "pretrain" / "hf"
    config = load_config(
        "demo",
        [
            f"workspace={ROOT}/teaching-{seed}", f"source.model={source}", "pretrain.enabled=false",
            f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", f"score.seed={seed}",
            f"distill.seed={seed}", *words,
        ],
    )  # fmt: skip
    for stage in ("download", "score", "plan", "prune"):
        run_stage(stage, config)
    facts = run_stage("logits", config).facts if config.distill.teacher_logits == "cache" else {}
    result = run_stage("distill", config)
    end = read_log(result.folder / "metrics.jsonl")[-1]
    return {
        "loss": end["val_loss"],
        "pruned": loss(config, Path(config.workspace) / "pruned"),
        "bytes_per_token": facts.get("bytes_per_token", 0),
        "mass": facts.get("mass", 1.0),
    }


def main() -> None:
    """Teaches in all ways with all seeds and prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=150)
    args = arguments.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        teacher(seed, [])
        for way, words in WAYS.items():
            found[way].append(taught(seed, args.steps, words))
            print(way, seed, found[way][-1], flush=True)
    first = found["forward KL"]
    rows = []
    for way, results in found.items():
        losses = " / ".join(f"{result['loss']:.4f}" for result in results)
        apart = " / ".join(f"{r['loss'] - f['loss']:+.4f}" for r, f in zip(results, first, strict=True))
        kept = f"{results[0]['bytes_per_token']:.0f}" if results[0]["bytes_per_token"] else "-"
        rows.append((way, losses, apart, kept, f"{results[0]['mass']:.1%}"))
    columns = ("teaching", "held-out loss", "against forward KL", "bytes per token", "mass")
    print(markdown(columns, tuple(rows)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "teaching.json").write_text(json.dumps({"steps": args.steps, "ways": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
