"""What the host does in a step of ``minitron distill``, against a hand-written loop.

Python's calls, which are the same in every run, and CPU time, which on a shared machine is not, where layers compute nothing.

The models have as many layers as SmolLM2-135M, and hardly a number in them: what is left is what a GPU's host does too,
beside launching kernels.

    python -m benchmarks.host
"""

import cProfile
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.duel import RESULTS
from benchmarks.gpu.smol import TINY, Job, pruned_at
from benchmarks.gpu.train import Loop
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.stages.run import run_stage
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json

JOB = Job({**TINY, "num_hidden_layers": 30, "hidden_size": 32, "intermediate_size": 32},
          ("plan.ffn=16", "plan.drop_layers=[24,25,26,27]"), 8, 2, 60, 100_000)  # fmt: skip
TIMES = 4
FIRST, LAST = 10, 50
"""Of one run, the steps whose calls are counted: what happens once has happened, or comes behind them."""


def _a_step(*runs: Callable[[], object]) -> list[float]:
    """Milliseconds of CPU time between two steps of each, its lowest tenth: what others do here adds to the rest."""
    marks: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: marks.append(time.process_time()))
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(TIMES):
        for run, found in zip(runs, spent, strict=True):
            marks.clear()
            run()
            found += [1000 * (later - earlier) for earlier, later in pairwise(marks)]
    hook.remove()
    return [sorted(found)[len(found) // 10] for found in spent]


def _calls(run: Callable[[], object]) -> float:
    """Calls of functions in a step, built-in ones included."""
    profile, seen = cProfile.Profile(), 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == FIRST:
            profile.enable()
        elif seen == LAST:
            profile.disable()

    hook = register_optimizer_step_post_hook(count)
    run()
    hook.remove()
    return float(sum(entry.callcount for entry in profile.getstats())) / (LAST - FIRST)


def _stage(config: Config) -> None:
    shutil.rmtree(Workspace(workspace_of(config)).student, ignore_errors=True)
    run_stage("distill", config)


def main() -> None:
    """Measures, prints and keeps the result."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        config = pruned_at(place, JOB, "cpu")
        folders = place / "teacher", Workspace(workspace_of(config)).pruned

        runs = lambda: _stage(config), lambda: Loop(*folders, "cpu", JOB).seconds(JOB.samples)
        ours, theirs = _a_step(*runs)
        calls = [round(_calls(run)) for run in runs]
    found = {
        "stage_ms": round(ours, 1),
        "loop_ms": round(theirs, 1),
        "ratio": round(ours / theirs, 3),
        "stage_calls": calls[0],
        "loop_calls": calls[1],
    }
    write_json(RESULTS / "host.json", found)
    print(
        f"CPU time a step: minitron distill {ours:.1f} ms, by hand {theirs:.1f} ms: {ours / theirs:.3f}\n"
        f"Python's calls a step: minitron distill {calls[0]}, by hand {calls[1]}: {calls[0] / calls[1]:.3f}"
    )


if __name__ == "__main__":
    main()
