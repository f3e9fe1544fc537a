"""What a step of ``minitron distill`` spends its time on: the dearest kernels, the card's idle time, waits of the host."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import Row, device_of, wait
from benchmarks.gpu.smol import Job, job_of, pruned_at
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.losses.fused_linear_loss import LossWeights
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.plugin.trainer import Options, TrainingSettings, train
from nemo_minitron.workspace.layout import Workspace

STEPS, KERNELS = 5, 10
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "aten::_local_scalar_dense",
    "aten::nonzero",
)  # fmt: skip
"""Calls and copies for which the host waits. One cudaEventSynchronize a step is the guard's, of the step before."""


class Watch(Callback):
    """Profiles some steps, none of which is logged.

    Attributes:
        found: what was seen.
    """

    def __init__(self, first: int, device: str) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self.first, self.device, self.found = first, device, profile(activities=kinds)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Begins with the first of them."""
        if trainer.global_step == self.first:
            wait(self.device)
            self.found.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Ends behind the last one."""
        if trainer.global_step == self.first + STEPS:
            wait(self.device)
            self.found.stop()


def rows(tiny: bool) -> list[Row]:
    """Times are of a step."""
    device, job = device_of(tiny), job_of(tiny)
    with tempfile.TemporaryDirectory() as folder:
        config = pruned_at(Path(folder), job, device)
        size = job.samples
        while True:
            try:
                watch = _profiled(Path(folder), config, job, device, size)
                break
            except torch.OutOfMemoryError:
                size //= 2
                torch.cuda.empty_cache()
    return _rows(watch.found, device)


def _profiled(place: Path, config: Config, job: Job, device: str, size: int) -> Watch:
    pruned, watch = Workspace(workspace_of(config)).pruned, Watch(job.steps // 2 + 1, device)
    trainer = {
        **config.trainer, "accumulate_grad_batches": job.samples // size, "max_steps": job.steps // 2 + STEPS + 2,
        "val_check_interval": None, "limit_val_batches": 0, "log_every_n_steps": 10_000,
    }  # fmt: skip
    tokens_NS = torch.randint(0, 512, (4 * job.samples, job.positions + 1))
    options = Options(compile="auto")
    train(
        load_model(pruned, dtype=torch.float32),
        read_config(pruned),
        None,
        TrainingSettings(trainer, config.optim, config.exp_manager, size, 0, options),
        tokens_NS,
        tokens_NS[: job.samples],
        place / f"state-{size}",
        [KnowledgeDistillation(load_model(place / "teacher"), weights=LossWeights()), watch],
    )
    return watch


def _rows(found: profile, device: str) -> list[Row]:
    cuda = device == "cuda"
    # annotations lie around kernels, and would count them twice
    events = [e for e in found.events() or [] if not getattr(e, "is_user_annotation", False)]
    there = [event for event in events if event.device_type == DeviceType.CUDA] if cuda else events
    spent: dict[str, float] = {}
    for event in there:
        took = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        spent[event.name] = spent.get(event.name, 0.0) + took
    whole = sum(spent.values())
    dearest = sorted(spent, key=lambda name: -spent[name])[:KERNELS]
    result = [
        Row(name[:44], spent[name] / 1000 / STEPS, spent[name] / whole, note=name[44:160])
        for name in dearest
    ]
    result.append(
        Row("all kernels", whole / 1000 / STEPS, 1.0, note=f"{len(there) / STEPS:.0f} a step")
    )
    if cuda:
        busy, span = _busy([(e.time_range.start, e.time_range.end) for e in there])
        result.append(
            Row("a step", span / 1000 / STEPS, note=f"the card is idle {1 - busy / span:.1%} of it")
        )
    for name in WAITS:
        count = sum(event.name.startswith(name) for event in events)
        result.append(Row(f"{name}, a step", 0.0, note=f"{count / STEPS:.1f}"))
    return result


def _busy(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Time covered by spans that may overlap, and from the first to the last."""
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - min(start for start, _ in spans)
