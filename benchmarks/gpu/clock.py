"""Time and memory on a device, and what a piece of the GPU's measurements gives back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

OUT_OF_MEMORY = float("inf")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        milliseconds: the median of several runs; infinite where memory ran out.
        ratio: to the reference of the same run, whose own is 1; None: it has none.
        gib: peak growth of memory while it ran.
        note: tokens a second, errors and the like.
    """

    what: str
    milliseconds: float
    ratio: float | None = None
    gib: float | None = None
    note: str = ""


def device_of(tiny: bool) -> str:
    """``--try`` runs the same code on the CPU, with tiny sizes."""
    return "cpu" if tiny else "cuda"


def wait(device: str) -> None:
    """Until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(device: str, run: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """Milliseconds (median) of a run, and GiB by which memory grew at its peak, after a first run that does not count."""
    try:
        run()
        wait(device)
        before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            wait(device)
            times.append(1000 * (time.perf_counter() - start))
        grown = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
        return median(times), grown / 2**30
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return OUT_OF_MEMORY, OUT_OF_MEMORY


def rows_of(measured: dict[str, tuple[float, float]], reference: str) -> list[Row]:
    """Rows whose ratios are to one of them."""
    base = measured[reference][0]
    return [Row(name, ms, ms / base, gib) for name, (ms, gib) in measured.items()]
