"""What a way of choosing sizes is worth: half the parameters, the same steps of distillation in all, searches included.

Ways: the same ratio for every width; the size nearest to the budget; successive halving of the nearest (what a search was
before it screened); the winner by screening alone; screening, then successive halving. Steps that a search spends on
its rounds are taken off its winner's. Teachers are trained on the standard library, one per seed, and stay in runs/search.

``--space fine`` chooses from four times as many sizes, of which those that a grid holds are left out: same ratio and nearest.
A search whose rounds are continued (plan.budget.continued) takes off its winner's steps only what the others took.

Also: what one screened candidate takes, beside the loss of a loaded model of its size.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.duel import RESULTS
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import load_config
from nemo_minitron.config.config import Config
from nemo_minitron.data.mixtures import validation_samples
from nemo_minitron.evaluation.held_out_loss import held_out_loss
from nemo_minitron.evaluation.report import markdown
from nemo_minitron.evaluation.screening import read_screen
from nemo_minitron.evaluation.sorted_teacher import SortedTeacher
from nemo_minitron.flows.sweep import share
from nemo_minitron.models.causal_lm import frozen, load_model, load_tokenizer
from nemo_minitron.proofs.tiny_models import random_model
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.select import score_shape, select_units
from nemo_minitron.pruning.shortlist import rank_correlation
from nemo_minitron.pruning.size_search import candidates, default_choices, halving, rungs
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.scoring.importance import random_scores
from nemo_minitron.stages.run import run_stage

ROOT = Path("runs/search")
SHARE, TOLERANCE = 0.5, 0.05
TEACHER = [
    "pretrain.model.vocab_size=512", "pretrain.model.hidden_size=64", "pretrain.model.intermediate_size=256",
    "pretrain.model.num_hidden_layers=5", "pretrain.trainer.max_steps=500", "pretrain.trainer.val_check_interval=500",
    "data.train.sequence_length=64", "data.validation.sequence_length=64", "data.validation.samples=128",
    "data.calibration.sequence_length=64", "data.calibration.samples=128", "trainer.enable_progress_bar=false",
]  # fmt: skip
"""Smaller than the demo's, so that all ways and seeds take minutes."""
FINE = {
    "hidden": [36, 40, 44, 48, 52, 56, 60, 64], "ffn": [64, 96, 128, 160, 192, 224, 256], "heads": [4, 8],
    "layers": [3, 4, 5],
}  # fmt: skip
"""42 sizes in the window, where the grid that a search makes has ten."""
Sizes = Mapping[str, int]


def teacher(seed: int) -> Config:
    """Trains and scores the teacher of a seed, unless it is there."""
    config = load_config(
        "demo",
        [
            f"workspace={ROOT}/{seed}/teacher", f"pretrain.seed={seed}", f"score.seed={seed}",
            *(f"plan.{name}=null" for name in ("hidden", "ffn", "heads", "kv_heads", "layers")),
            *TEACHER,
        ],
    )  # fmt: skip
    for stage in ("pretrain", "download", "score"):
        run_stage(stage, config)
    return config


def distilled(
    base: Config,
    seed: int,
    sizes: Sizes,
    steps: int,
    stop: int | None = None,
    begun: int | None = None,
) -> float:
    """Held-out loss of a cut model after so many steps, nats per token.

    Args:
        base: the teacher's.
        seed: its seed.
        sizes: those of the cut.
        steps: of the schedule.
        stop: the step after which it is measured; None: the last.
        begun: the step that it resumes from, measured before; None: it starts over.
    """
    name = "-".join(f"{axis}{size}" for axis, size in sizes.items())
    length = str(steps) if stop is None and begun is None else f"{steps}-{stop or 'all'}"
    workspace = ROOT / str(seed) / length / name
    before = (ROOT / str(seed) / f"{steps}-{begun}" / name / "student").absolute()
    share(Path(base.workspace), workspace)
    config = load_config("demo", [
        f"workspace={workspace}", f"pretrain.seed={seed}", f"score.seed={seed}", f"distill.seed={seed}",
        *(f"plan.{axis}=null" for axis in ("hidden", "ffn", "heads", "kv_heads", "layers")),
        *(f"plan.{axis}={size}" for axis, size in sizes.items()),
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
        f"optim.sched.warmup_steps={min(20, max(1, steps // 5))}", *TEACHER,
        *([] if stop is None else [f"distill.stop_after={stop}"]),
        *([] if begun is None else [f"distill.go_on_from={before}"]),
    ])  # fmt: skip
    for stage in ("plan", "prune", "distill"):
        result = run_stage(stage, config)
    folder = result.folder / "hf"
    samples_NS = validation_samples(config, load_tokenizer(folder))
    with frozen(load_model(folder)) as model:
        return held_out_loss(model, open_checkpoint(folder).family, samples_NS, 16)


def halved(
    base: Config, seed: int, found: Sequence[Sizes], steps: int
) -> tuple[Sizes, int, list[list[float]]]:
    """The winner of successive halving, the steps that it took, and the losses of each round."""
    left, spent, losses = list(range(len(found))), 0, []
    seen: list[list[float]] = []
    for count, length in rungs(len(found), steps):
        left = left[:count]
        losses = [distilled(base, seed, found[one], length) for one in left]
        spent += count * length
        row = [math.nan] * len(found)
        for one, loss in zip(left, losses, strict=True):
            row[one] = loss
        seen.append(row)
        left = [left[i] for i in halving(losses, len(left))]
    return found[left[0]], spent, seen


def continued(
    base: Config, seed: int, found: Sequence[Sizes], rung: int, steps: int
) -> tuple[Sizes, float]:
    """The winner of successive halving whose rounds are the beginnings of whole trainings, and its last loss."""
    ladder = rungs(len(found), rung)
    ends = [0, *(length for _, length in ladder)]
    others = sum(
        (count - 1) * (length - start) for (count, length), start in zip(ladder, ends, strict=False)
    )
    left, begun = list(range(len(found))), None
    for count, length in ladder:
        left = left[:count]
        losses = [distilled(base, seed, found[one], steps - others, length, begun) for one in left]
        left, begun = [left[i] for i in halving(losses, len(left))], length
    return found[left[0]], distilled(base, seed, found[left[0]], steps - others, None, begun)


def uniform(base: Config, params: float) -> Sizes:
    """Every width cut by the same ratio, all layers kept, as near to the budget as whole units allow."""
    model = open_checkpoint(Path(base.workspace) / "pretrain" / "hf").architecture
    least, most = params * (1 - TOLERANCE), params * (1 + TOLERANCE)
    wide = default_choices(model, SHARE, wide=True) | {"layers": [model.sizes["layers"]]}
    inside = candidates(model, wide, round(least), round(most))

    def uneven(sizes: Sizes) -> float:
        widths = [math.log(n / model.sizes[axis]) for axis, n in sizes.items() if axis != "layers"]
        return statistics.pstdev(widths)

    return min(inside, key=lambda one: uneven(one.sizes)).sizes


def seed_of_all(seed: int, args: argparse.Namespace) -> dict[str, float | None]:
    """Final losses of all ways for one seed."""
    base = teacher(seed)
    folder = Path(base.workspace) / "pretrain" / "hf"
    model = open_checkpoint(folder).architecture
    params = model_size(model).parameters * SHARE
    budget = base.plan.budget
    budget.params, budget.tolerance = params, TOLERANCE
    budget.screened, budget.candidates, budget.screen_samples = args.screened, args.candidates, 64
    budget.choices = FINE if args.space == "fine" else {}
    screen = read_screen(run_stage("screen", base).folder)
    shortlist = [screen.candidates[number].sizes for number in screen.chosen]
    least, most = round(params * (1 - TOLERANCE)), round(params * (1 + TOLERANCE))
    nearest = [
        one.sizes
        for one in candidates(model, default_choices(model, SHARE), least, most)[: args.candidates]
    ]
    ours, spent, seen = halved(base, seed, shortlist, args.rung)
    left = {"screening alone": screen.candidates[0].sizes}
    if args.space == "grid":
        left |= {"same ratio": uniform(base, params), "nearest": nearest[0]}
    found: dict[str, float | None] = {
        name: distilled(base, seed, sizes, args.steps) for name, sizes in left.items()
    }
    if args.space == "grid":
        todays, spent_today, _ = halved(base, seed, nearest, args.rung)
        found["halving of the nearest"] = distilled(base, seed, todays, args.steps - spent_today)
    found["screening, then halving"] = distilled(base, seed, ours, args.steps - spent)
    judged = [screen.candidates[number].judged or math.nan for number in screen.chosen]
    goes_on, found["screening, then halving, continued"] = continued(
        base, seed, shortlist, args.rung, args.steps
    )
    found["rank correlation of screening with the first round"] = rank_correlation(judged, seen[0])
    print(
        seed,
        {name: dict(sizes) for name, sizes in left.items()},
        dict(ours),
        dict(goes_on),
        found,
        flush=True,
    )
    return found


def overhead() -> dict[str, float]:
    """Seconds of a candidate, built and measured, and of the loss alone of the pruned model, loaded before."""
    config = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        source = random_model(config, Path(name) / "source")
        checkpoint = open_checkpoint(source)
        family, sizes = checkpoint.family, checkpoint.architecture.sizes
        axes = [axis for axis in checkpoint.architecture.prunable if axis != "layers"]
        scores = {a: random_scores(score_shape(family, sizes, a), i) for i, a in enumerate(axes)}
        asked, layers = {"hidden": 384, "ffn": 1024, "heads": 4}, (0, 1, 3, 4, 5, 7)
        keep = select_units(family, scores, sizes, {**sizes, **asked})
        target = Path(name) / "pruned"
        target.mkdir()
        write_pruned(checkpoint, [(target, Cut(checkpoint.architecture, keep, layers))], 10**9)
        samples_NS = torch.randint(2, 4096, (16, 257), generator=torch.Generator().manual_seed(0))
        sorted_teacher, loaded = (
            SortedTeacher(checkpoint, scores, torch.float32),
            load_model(target),
        )

        def of(model: object) -> float:
            with frozen(model):
                return held_out_loss(model, family, samples_NS, 8)

        best = {"loss of the pruned model": math.inf, "candidate, built and measured": math.inf}
        for _ in range(6):  # in turn; time of this process, whatever else the machine does
            start = time.process_time()
            of(loaded)
            middle = time.process_time()
            of(sorted_teacher.candidate(asked, layers))
            taken = (middle - start, time.process_time() - middle)
            best = {
                name: min(old, new) for (name, old), new in zip(best.items(), taken, strict=True)
            }
        apart = abs(of(loaded) - of(sorted_teacher.candidate(asked, layers)))
    first = best["loss of the pruned model"]
    return {**best, "ratio": best["candidate, built and measured"] / first, "losses apart": apart}


def main() -> None:
    """Runs all ways of all seeds and prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=300, help="of distillation, in all")
    arguments.add_argument("--rung", type=int, default=20, help="steps of a search's last round")
    arguments.add_argument("--candidates", type=int, default=4)
    arguments.add_argument("--screened", type=int, default=32)
    arguments.add_argument("--space", choices=("grid", "fine"), default="grid")
    args = arguments.parse_args()
    cost = overhead() if args.space == "grid" else {}
    print("a candidate takes", cost, flush=True)
    per_seed = [seed_of_all(seed, args) for seed in range(args.seeds)]
    ways = {way: [one[way] for one in per_seed] for way in per_seed[0]}
    rows = []
    for way, values in ways.items():
        numbers = [value for value in values if value is not None]
        spread = (
            f"{np.mean(numbers):.4f} ± {np.std(numbers, ddof=1):.4f}" if len(numbers) > 1 else "–"
        )
        rows.append((way, *("–" if v is None else f"{v:.4f}" for v in values), spread))
    titles = ("sizes by", *(f"seed {seed}" for seed in range(args.seeds)), "mean ± deviation")
    print(f"held-out loss after {args.steps} steps in all\n\n{markdown(titles, tuple(rows))}")
    RESULTS.mkdir(exist_ok=True)
    told = {
        "settings": vars(args),
        "overhead": cost,
        "ways": ways,
    }
    name = "search.json" if args.space == "grid" else "search-fine.json"
    (RESULTS / name).write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
