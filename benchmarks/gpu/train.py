"""``minitron distill`` against a hand-written loop in plain PyTorch: the same models, steps and loss."""

import dataclasses
import gc
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.clock import Row, device_of, wait
from benchmarks.gpu.smol import Job, job_of, pruned_at
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.families import families
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.models.causal_lm import hidden_states, layers_of, load_model, projection_of
from nemo_minitron.plugin.trainer import forward_flops
from nemo_minitron.stages.run import run_stage
from nemo_minitron.training.callbacks import PEAK_TFLOPS
from nemo_minitron.workspace.layout import Workspace, metrics_in
from nemo_minitron.workspace.training_log import read_log

FAMILY = families()["llama"]


def rows(tiny: bool) -> list[Row]:
    """The loop, and the stage with and without compiled layers."""
    device, job = device_of(tiny), job_of(tiny)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        started = time.perf_counter()
        config = pruned_at(place, job, device)
        print(f"prepared in {time.perf_counter() - started:.0f} s", flush=True)
        found = {}
        for name, choice in (
            ("minitron distill, compile=off", "off"),
            ("minitron distill", "auto"),
        ):
            found[name] = _measured(lambda size, way=choice: _stage(config, job, way, size), job)
            print(f"  {name}: {found[name][0] * 1000:.1f} ms a step", flush=True)
        loop = Loop(place / "teacher", Workspace(workspace_of(config)).pruned, device, job)
        reference = "plain PyTorch, compiled layers"
        found[reference] = _measured(loop.seconds, job)
    return [
        Row(
            name,
            1000 * seconds,
            seconds / found[reference][0],
            gib,
            _speed(job, loop.flops, seconds, note),
        )
        for name, (seconds, gib, note) in found.items()
    ]


def _measured(run: Any, job: Job) -> tuple[float, float, str]:
    """Seconds a step, GiB at the peak, and the size of micro-batches: the largest that fits."""
    size = job.samples
    while True:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = run(size)
            gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
            return seconds, gib, f"micro-batches of {size}"
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def _stage(config: Config, job: Job, compile: str, size: int) -> float:
    """Seconds a step of the stage, by its own log; the first third of the steps does not count."""
    student = Workspace(workspace_of(config)).student
    shutil.rmtree(student, ignore_errors=True)
    trainer = {**config.trainer, "accumulate_grad_batches": job.samples // size}
    trainer["val_check_interval"] = job.steps * trainer["accumulate_grad_batches"]
    changed = dataclasses.replace(
        config,
        trainer=trainer,
        training=dataclasses.replace(config.training, compile=compile),
        distill=dataclasses.replace(config.distill, batch_size=size),
    )
    run_stage("distill", changed)
    lines = [line for line in read_log(metrics_in(student)) if "tokens_per_second" in line]
    speeds = [line["tokens_per_second"] for line in lines if line["step"] > job.steps // 3]
    return job.tokens / median(speeds)


class Loop:
    """What one would write by hand.

    Attributes:
        flops: of student and teacher, per token of a training step.
    """

    def __init__(self, teacher: Path, student: Path, device: str, job: Job) -> None:
        self.device, self.job = device, job
        self.folders = teacher, student
        models = [load_model(folder) for folder in self.folders]
        forward = [forward_flops(model, FAMILY, job.positions) for model in models]
        self.flops = forward[0] + 3 * forward[1]

    def seconds(self, size: int) -> float:
        """Seconds a step, with micro-batches of so many samples."""
        device, job, cuda = self.device, self.job, self.device == "cuda"
        teacher = load_model(self.folders[0]).to(device).eval().requires_grad_(False)
        student = load_model(self.folders[1], dtype=torch.float32).to(device).train()
        if cuda:
            for layer in [*layers_of(teacher, FAMILY), *layers_of(student, FAMILY)]:
                layer.compile(dynamic=False)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=cuda)
        tokens_NS = torch.randint(0, 512, (job.samples, job.positions + 1), device=device)
        weights, parts = LossWeights(), job.samples // size

        def step() -> None:
            for part_BS in tokens_NS.split(size):
                read_BS, labels_T = part_BS[:, :-1], part_BS[:, 1:].flatten()
                with torch.autocast(device, torch.bfloat16):
                    with torch.no_grad():
                        taught_TG = hidden_states(teacher, FAMILY, read_BS).flatten(0, 1)
                    hidden_TH = hidden_states(student, FAMILY, read_BS).flatten(0, 1)
                    ours = projection_of(student, FAMILY, hidden_TH)
                    theirs = projection_of(teacher, FAMILY, taught_TG)
                    terms = fused_linear_loss(ours, labels_T, weights, theirs, compiled=cuda)
                (terms.loss / parts).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(job.steps // 3):
            step()
        wait(device)
        start, counted = time.perf_counter(), job.steps - job.steps // 3
        for _ in range(counted):
            step()
        wait(device)
        return (time.perf_counter() - start) / counted


def _speed(job: Job, flops: int, seconds: float, note: str) -> str:
    speed = job.tokens / seconds
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in card), None)
    mfu = "" if peak is None else f", MFU {speed * flops / peak / 1e12:.3f}"
    return f"{speed:,.0f} tokens/s{mfu}, {note}"
