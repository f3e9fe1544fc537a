"""What the host does in a step of ``minitron distill``, against a hand-written loop: CPU time where layers compute nothing.

The models have as many layers as SmolLM2-135M, and hardly a number in them: what is left is what a GPU's host does too,
beside launching kernels. The difference of two trainings of different length is counted, so that no preparation is.

    python -m benchmarks.host
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.duel import RESULTS
from benchmarks.gpu.smol import TINY, Job, pruned_at
from benchmarks.gpu.train import Loop
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.stages.run import run_stage
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json

JOB = Job({**TINY, "num_hidden_layers": 30, "hidden_size": 32, "intermediate_size": 32},
          ("plan.ffn=16", "plan.drop_layers=[24,25,26,27]"), 8, 2, 20, 100_000)  # fmt: skip
STEPS, TIMES = (20, 80), 5


def _a_step(run: Callable[[int], object]) -> float:
    """Milliseconds of CPU time a step: the least difference between a long and a short training."""
    spent = {steps: [] for steps in STEPS}
    for _ in range(TIMES):
        for steps, found in spent.items():
            begun = time.process_time()
            run(steps)
            found.append(time.process_time() - begun)
    short, long = (min(spent[steps]) for steps in STEPS)
    return 1000 * (long - short) / (STEPS[1] - STEPS[0])


def _stage(config: Config, steps: int) -> None:
    shutil.rmtree(Workspace(workspace_of(config)).student, ignore_errors=True)
    rhythm = {"max_steps": steps, "val_check_interval": steps, "log_every_n_steps": 10}
    run_stage("distill", dataclasses.replace(config, trainer={**config.trainer, **rhythm}))


def main() -> None:
    """Measures, prints and keeps the result."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        config = pruned_at(place, JOB, "cpu")
        folders = place / "teacher", Workspace(workspace_of(config)).pruned

        def by_hand(steps: int) -> None:
            Loop(*folders, "cpu", dataclasses.replace(JOB, steps=steps)).seconds(JOB.samples)

        ours, theirs = _a_step(lambda steps: _stage(config, steps)), _a_step(by_hand)
    found = {
        "stage_ms": round(ours, 1),
        "loop_ms": round(theirs, 1),
        "ratio": round(ours / theirs, 3),
    }
    write_json(RESULTS / "host.json", found)
    print(
        f"CPU time a step: minitron distill {ours:.1f} ms, by hand {theirs:.1f} ms: {ours / theirs:.3f}"
    )


if __name__ == "__main__":
    main()
