"""Fair timing of contestants on a noisy machine: rounds in turn, best of each, ratios to the first."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def duel(contestants: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Best seconds of each contestant; they take turns, so that a slow minute hits all of them."""
    best = dict.fromkeys(contestants, float("inf"))
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if turn:  # the first round only warms up
                best[name] = min(best[name], seconds)
    return best


def show(
    title: str, reference: str, seconds: Mapping[str, float], aims: Mapping[str, float], **more: Any
) -> None:
    """Prints ratios to the reference beside their aims, and writes benchmarks/results/TITLE.json."""
    print(f"\n{title}: reference is {reference}, {seconds[reference]:.3f} s")
    ratios = {name: value / seconds[reference] for name, value in seconds.items()}
    for name, ratio in ratios.items():
        aim = f"  (aim <= {aims[name]:.2f})" if name in aims else ""
        print(f"  {name:<44} {ratio:6.3f} x{aim}")
    for name, value in more.items():
        print(f"  {name}: {value}")
    RESULTS.mkdir(exist_ok=True)
    written = {"ratios": ratios, "seconds": dict(seconds), "machine": platform.platform(), **more}
    (RESULTS / f"{title}.json").write_text(json.dumps(written, indent=2) + "\n")
