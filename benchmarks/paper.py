"""Toy-scale counterparts of [P1]'s findings: what the ranking is worth, and pruning against training from scratch.

For every seed a teacher is trained on the standard library; for every ranking it is pruned to about half, measured as it
is, distilled and measured again; a model of the same shape is trained from scratch on the same tokens. The spread over
seeds is shown; a finding that does not hold at this scale shows as such. Workspaces stay in runs/paper and are resumed.
"""

import argparse
import json
import statistics
from pathlib import Path

from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.report import markdown, read_report
from nemo_minitron.stages.run import run_stage

RANKINGS = ("activation", "magnitude", "random")


def losses(seed: int, ranking: str, extra: list[str]) -> dict[str, float]:
    """Held-out losses of one seed and ranking: teacher, pruned, distilled, from scratch."""
    root = Path("runs/paper")
    teacher = load_config(
        "demo", [f"workspace={root}/teacher-{seed}", f"pretrain.seed={seed}", *extra]
    )
    run_stage("pretrain", teacher)
    overrides = [
        f"workspace={root}/{ranking}-{seed}", f"source.model={root}/teacher-{seed}/pretrain/hf",
        "pretrain.enabled=false", f"score.importance={ranking}", f"score.seed={seed}", f"distill.seed={seed}",
        f"pretrain.seed={seed}", "evaluate.speed=false", "evaluate.tasks=[]", *extra,
    ]  # fmt: skip
    config = load_config("demo", overrides)
    for stage in ("download", "score", "plan", "prune", "distill"):
        run_stage(stage, config)
    config.pretrain.baseline = True
    run_stage("pretrain", config)
    run_stage("evaluate", config)
    return {
        name: row["loss"]
        for name, row in read_report(Path(config.workspace) / "report")["models"].items()
    }


def main() -> None:
    """Runs all seeds and rankings and prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("overrides", nargs="*", help="as on minitron's command line")
    args = arguments.parse_args()
    found = {
        ranking: [losses(seed, ranking, args.overrides) for seed in range(args.seeds)]
        for ranking in RANKINGS
    }
    rows = []
    for ranking, runs in found.items():
        cells = [
            " / ".join(f"{run[name]:.3f}" for run in runs)
            for name in ("teacher", "pruned", "student", "scratch")
        ]
        gains = [run["scratch"] - run["student"] for run in runs]
        rows.append((ranking, *cells, f"{statistics.mean(gains):+.3f}"))
    titles = ("ranking", "teacher", "pruned", "distilled", "from scratch", "distilled better by")
    print(f"held-out loss, one number per seed\n\n{markdown(titles, tuple(rows))}")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "paper.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
