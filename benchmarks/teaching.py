"""What ways of teaching are worth: one pruned model, the same samples and steps, taught in different ways.

Losses on hidden states, a mix with cross-entropy, teachers of whom a few entries per token lie on disk, and
optipfair's distillation where it is installed (``pip install --no-deps optipfair``), each against forward KL from
the teacher beside the student. The teacher is trained on the standard library and stays in runs/teachers.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_teacher import ROOT, teacher
from benchmarks.duel import RESULTS
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.compose import load_config
from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import validation_samples
from nemo_minitron.data.training_samples import training_samples
from nemo_minitron.evaluation.report import markdown
from nemo_minitron.families import family_of
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.causal_lm import head_of, hidden_states, load_model, load_tokenizer
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.run import run_stage
from nemo_minitron.training.sampler import ConsumedSampler, Schedule

CACHE = ["distill.teacher_logits=cache"]
WAYS: dict[str, list[str]] = {
    "forward KL": [],
    "forward KL + 0.1 cross-entropy": ["distill.ce=0.1"],
    "cross-entropy alone": ["distill.kl=0", "distill.ce=1"],
    "forward KL, teacher in 8 bits": ["distill.teacher_dtype=int8"],
    "forward KL + hidden, embedding": ["distill.intermediate.terms=[hidden,embedding]"],
    "forward KL + all intermediate": [
        "distill.intermediate.terms=[hidden,embedding,mlp_input,attention]",
    ],
    "cache, top 8": [*CACHE, "distill.cache.entries=8"],
    "cache, top 64": [*CACHE, "distill.cache.entries=64"],
    "cache, 8 drawn": [*CACHE, "distill.cache.method=sampling", "distill.cache.entries=8"],
    "cache, 64 drawn": [*CACHE, "distill.cache.method=sampling", "distill.cache.entries=64"],
}


PEERS = {
    "optipfair, its defaults": {},
    "optipfair, divergence alone": {"alpha": 0.0, "beta": 1.0},
}
"""Ways of optipfair's: arguments of its ``distill_model``."""


def pruned(seed: int, steps: int, words: list[str]) -> Config:
    """The pruned model of a seed, and the configuration of its distillation."""
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
    return config


def taught(seed: int, steps: int, words: list[str]) -> dict[str, float]:
    """Held-out loss and divergence of the student, and what the cache takes."""
    config = pruned(seed, steps, words)
    facts = run_stage("logits", config).facts if config.distill.teacher_logits == "cache" else {}
    result = run_stage("distill", config)
    return {
        **held_out(config, load_model(result.folder / "hf")),
        "bytes_per_token": facts.get("bytes_per_token", 0),
        "mass": facts.get("mass", 1.0),
    }


def held_out(config: Config, student: Any) -> dict[str, float]:
    """Cross-entropy, and KL from the teacher, on the held-out samples (nats a token)."""
    folder = teacher_folder(config)[0]
    family, teacher = family_of(read_config(folder)), load_model(folder)
    samples_NS = validation_samples(config, load_tokenizer(folder))
    sums = torch.zeros(2)
    with torch.no_grad():
        for batch_BS in samples_NS.split(16):
            hidden = [
                hidden_states(m.eval(), family, batch_BS[:, :-1]).flatten(0, 1)
                for m in (student, teacher)
            ]
            ours, theirs = (
                Projection(hidden[0], head_of(student)),
                Projection(hidden[1], head_of(teacher)),
            )
            terms = fused_linear_loss(ours, batch_BS[:, 1:].flatten(), LossWeights(), theirs)
            sums += torch.stack([terms.ce, terms.divergence]) * len(batch_BS)
    found = (sums / len(samples_NS)).tolist()
    return {"loss": found[0], "divergence": found[1]}


def taught_by_peer(seed: int, steps: int, arguments: dict[str, float]) -> dict[str, float]:
    """The same student and the same batches in the same order, taught by optipfair."""
    from optipfair.distillation import distill_model

    config = pruned(seed, steps, [])
    teacher, student = (
        load_model(teacher_folder(config)[0]),
        load_model(Path(config.workspace) / "pruned"),
    )
    size = config.distill.batch_size
    tokenizer = load_tokenizer(Path(config.workspace) / "pruned")
    samples = training_samples(config, tokenizer, steps * size, Ranks())
    order = ConsumedSampler(
        len(samples), size, lambda: Schedule(0, steps, steps), config.distill.seed
    )
    batches = [{"input_ids": torch.stack([samples[row] for row in rows])} for rows in order]
    warmup = config.optim["sched"]["warmup_steps"] / steps
    distill_model(
        student, teacher, batches, epochs=1, accumulation_steps=1, learning_rate=config.optim["lr"],
        warmup_ratio=warmup, show_progress=False, **arguments,
    )  # fmt: skip
    return {**held_out(config, student), "bytes_per_token": 0, "mass": 1.0}


def main() -> None:
    """Teaches in all ways with all seeds and prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=150)
    args = arguments.parse_args()
    peers = PEERS if importlib.util.find_spec("optipfair") else {}
    found: dict[str, list[dict[str, float]]] = {
        "not taught": [],
        **{way: [] for way in (*WAYS, *peers)},
    }
    for seed in range(args.seeds):
        teacher(seed, [])
        config = pruned(seed, args.steps, [])
        student = load_model(Path(config.workspace) / "pruned")
        found["not taught"].append({**held_out(config, student), "bytes_per_token": 0, "mass": 1.0})
        for way, words in WAYS.items():
            found[way].append(taught(seed, args.steps, words))
        for way, settings in peers.items():
            found[way].append(taught_by_peer(seed, args.steps, settings))
        print({way: results[-1] for way, results in found.items()}, flush=True)
    first = found["forward KL"]
    rows = []
    for way, results in found.items():
        losses = " / ".join(f"{result['loss']:.4f}" for result in results)
        apart = " / ".join(
            f"{r['loss'] - f['loss']:+.4f}" for r, f in zip(results, first, strict=True)
        )
        perplexity = " / ".join(f"{math.exp(result['loss']):.2f}" for result in results)
        divergence = " / ".join(f"{result['divergence']:.4f}" for result in results)
        kept = f"{results[0]['bytes_per_token']:.0f}" if results[0]["bytes_per_token"] else "-"
        mass = f"{results[0]['mass']:.1%}" if results[0]["bytes_per_token"] else "-"
        rows.append((way, losses, apart, perplexity, divergence, kept, mass))
    columns = (
        "teaching", "held-out loss", "against forward KL", "perplexity", "held-out KL", "bytes per token", "mass",
    )  # fmt: skip
    print(markdown(columns, tuple(rows)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "teaching.json").write_text(
        json.dumps({"steps": args.steps, "ways": found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
