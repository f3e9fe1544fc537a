"""What a ranking is worth: loss of a trained teacher right after a cut of about 30 % of one axis, nothing retrained.

Each axis by activation, magnitude and chance; layers by block influence, by the loss without them (one by one, in a block,
greedily) and by chance. Teachers are trained on the standard library, one per seed, and stay in runs/paper.
"""

import argparse
import json
from pathlib import Path

from benchmarks.duel import RESULTS
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import load_config
from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import validation_samples
from nemo_minitron.evaluation.held_out_loss import held_out_loss
from nemo_minitron.evaluation.report import markdown
from nemo_minitron.models.causal_lm import frozen, load_model, load_tokenizer
from nemo_minitron.stages.run import run_stage

WIDTHS = {
    "activation": [],
    "activation, pre-activation neurons": ["score.neurons=pre_activation"],
    "activation, 3 rounds": ["score.iterations=3"],
    "magnitude": ["score.importance=magnitude"],
    "random": ["score.importance=random"],
}
DEPTHS = {
    "block influence": [],
    "lm_loss, scattered": ["score.depth=lm_loss"],
    "lm_loss, contiguous": ["score.depth=lm_loss", "plan.layer_choice=contiguous"],
    "lm_loss, greedy": ["score.depth=lm_loss", "plan.layer_choice=greedy"],
    "magnitude": ["score.importance=magnitude"],
    "random": ["score.importance=random"],
}
ROOT = Path("runs/paper")


def teacher(seed: int, extra: list[str]) -> Config:
    """Trains the teacher of a seed, unless it is there."""
    config = load_config(
        "demo", [f"workspace={ROOT}/teacher-{seed}", f"pretrain.seed={seed}", *extra]
    )
    run_stage("pretrain", config)
    return config


def loss(config: Config, folder: Path) -> float:
    """Held-out loss in nats per token."""
    checkpoint = open_checkpoint(folder)
    with frozen(load_model(folder)) as model:
        return held_out_loss(
            model, checkpoint.family, validation_samples(config, load_tokenizer(folder)), 8
        )


def after(seed: int, words: list[str], extra: list[str]) -> float:
    """Held-out loss right after a cut."""
    source = ROOT / f"teacher-{seed}" / "pretrain" / "hf"
    config = load_config(
        "demo",
        [
            f"workspace={ROOT}/importance-{seed}", f"source.model={source}", "pretrain.enabled=false",
            *(f"plan.{name}=null" for name in ("hidden", "ffn", "heads", "kv_heads", "layers")),
            f"score.seed={seed}", *words, *extra,
        ],
    )  # fmt: skip
    for stage in ("download", "score", "plan", "prune"):
        run_stage(stage, config)
    return loss(config, Path(config.workspace) / "pruned")


def main() -> None:
    """Runs all cuts of all seeds and prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("overrides", nargs="*", help="as on minitron's command line")
    args = arguments.parse_args()
    rows: list[tuple[str, ...]] = []
    found: dict[str, dict[str, list[float]]] = {"teacher": {"": []}}
    for seed in range(args.seeds):
        config = teacher(seed, args.overrides)
        folder = Path(config.workspace) / "pretrain" / "hf"
        found["teacher"][""].append(loss(config, folder))
    checkpoint = open_checkpoint(folder)
    sizes = checkpoint.architecture.sizes
    cuts = {axis: round(sizes[axis] * 0.7 / 8) * 8 for axis in ("hidden", "ffn")}
    cuts["heads"] = sizes["kv_heads"] * max(1, round(sizes["heads"] / sizes["kv_heads"] * 0.7))
    cuts["layers"] = round(sizes["layers"] * 0.7)
    for axis, target in cuts.items():
        for name, words in (DEPTHS if axis == "layers" else WIDTHS).items():
            losses = [
                after(seed, [f"plan.{axis}={target}", *words], args.overrides)
                for seed in range(args.seeds)
            ]
            found.setdefault(f"{axis} {sizes[axis]} to {target}", {})[name] = losses
    for cut, rankings in found.items():
        rows += [
            (cut, name, *(f"{value:.3f}" for value in losses)) for name, losses in rankings.items()
        ]
    titles = ("cut", "ranking", *(f"seed {seed}" for seed in range(args.seeds)))
    print(f"held-out loss right after the cut\n\n{markdown(titles, tuple(rows))}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "importance.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
