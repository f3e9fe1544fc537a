"""What the pieces share: a profile of the machine, the command line as a process, the results' files."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.duel import RESULTS
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.speed import conditions
from nemo_minitron.stages.run import run_stage
from nemo_minitron.workspace.layout import Workspace, metrics_in
from nemo_minitron.workspace.training_log import read_log


@dataclass(frozen=True)
class Profile:
    """How much is computed.

    Attributes:
        name: part of the results' names.
        steps: of distillation, by piece.
        tokens: of a step, by piece.
        sequence: tokens of a sample of training, where a step has as many, and of validation.
        calibration: samples of 512 tokens that are scored.
        validation: samples that are measured.
        task_limit: questions of each task.
        screened, screen_samples: candidates of a screening, and samples of each.
        lr: learning rate where weights were cut away; ``vocabulary_lr`` where the vocabulary alone was.
        accelerator: Lightning's.
    """

    name: str
    steps: Mapping[str, int]
    tokens: Mapping[str, int]
    sequence: int
    calibration: int
    validation: int
    task_limit: int
    screened: int
    screen_samples: int
    lr: float
    vocabulary_lr: float
    accelerator: str

    def length(self, piece: str) -> int:
        """Tokens of a training sample."""
        return min(self.sequence, self.tokens[piece])


CPU = Profile(
    "cpu", {"smollm2-100m": 100, "smollm2-70m": 100, "gemma": 100, "smollm2-vocab": 200, "gemma-vocab": 200},
    {"smollm2-100m": 512, "smollm2-70m": 512, "gemma": 256, "smollm2-vocab": 256, "gemma-vocab": 256},
    256, 16, 16, 24, 16, 4, 3e-4, 5e-5, "cpu",
)  # fmt: skip
"""Two cores, for hours."""
GPU = Profile(
    "gpu", dict.fromkeys(CPU.steps, 1000), dict.fromkeys(CPU.steps, 32 * 1024),
    1024, 1024, 256, 600, 48, 64, 6e-4, 1e-4, "gpu",
)  # fmt: skip
"""One card, pieces of about ten minutes."""


@dataclass(frozen=True)
class Run:
    """One call.

    Attributes:
        root: folder of models, texts and workspaces.
        profile: how much is computed.
        prose: files of prose of the user's.
        german: folder with .mo files.
        extra: overrides of the command line, behind all others.
    """

    root: Path
    profile: Profile
    prose: tuple[str, ...] = ()
    german: str | None = None
    extra: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def minitron(self, piece: str, command: str, *overrides: str) -> None:
        """Runs a command as a user does; what it says goes to a log, and its last lines to the screen.

        Raises:
            SystemExit: it failed; its last line is the message.
        """
        log = self.root / "logs" / f"{piece}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "nemo_minitron", command, *overrides]
        shown = " ".join(["minitron", *words[3:]])
        print(f"$ {shown}", flush=True)
        start = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {shown}\n")
            file.flush()
            begin = file.tell()
            code = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                check=False,
            ).returncode
        self.seconds[f"{piece} {command}"] = round(time.monotonic() - start, 1)
        with log.open(encoding="utf-8") as file:
            file.seek(begin)
            said = file.read().splitlines()
        if code:
            raise SystemExit(f"{log}: exit code {code}: {next(filter(None, reversed(said)), '')}")
        print("\n".join(said[-3:]), flush=True)

    def stages(self, piece: str, stages: str, *overrides: str) -> None:
        """Does what ``minitron STAGE OVERRIDES`` does for each stage; one that is done returns at once.

        They share a process, because starting one takes longer than many of them.
        """
        # the last word counts where a key is given twice
        words = list({word.partition("=")[0]: word for word in (*overrides, *self.extra)}.values())
        config = load_config("config", words)
        for stage in ("download", *stages.split()):
            if stage != "download":
                print(f"$ minitron {stage} {' '.join(words)}", flush=True)
            start = time.monotonic()
            result = run_stage(stage, config)
            if result.made:
                self.seconds[f"{piece} {stage}"] = round(time.monotonic() - start, 1)
            for line in (result.headline, *result.notes):
                print(f"{stage}: {line}", flush=True)

    def workspace(self, piece: str) -> Path:
        """Where a piece's artifacts lie."""
        return self.root / piece

    def text(self, kind: str, part: str) -> str:
        """A text's file."""
        return f"{self.root}/text/{kind}-{part}.jsonl"

    def data(self, model: Path, piece: str, *kinds: str) -> list[str]:
        """Overrides that name source, workspace and text."""
        profile = self.profile
        return [
            f"source.model={model}", f"workspace={self.workspace(piece)}",
            f"data.train.paths=[{','.join(self.text(kind, 'train') for kind in kinds)}]",
            *([f"data.train.weights=[{','.join('1' for _ in kinds)}]"] if len(kinds) > 1 else []),
            f"data.train.sequence_length={profile.length(piece)}",
            "data.calibration.sequence_length=512", f"data.calibration.samples={profile.calibration}",
            *self.held_out("prose"),
        ]  # fmt: skip

    def held_out(self, kind: str) -> list[str]:
        """Overrides that name what is measured on."""
        profile = self.profile
        return [
            f"data.validation.paths=[{self.text(kind, 'validation')}]",
            f"data.validation.sequence_length={profile.sequence}", f"data.validation.samples={profile.validation}",
        ]  # fmt: skip

    def training(self, piece: str, lr: float) -> list[str]:
        """Overrides of a distillation."""
        profile, steps = self.profile, self.profile.steps[piece]
        return [
            f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
            f"distill.batch_size={profile.tokens[piece] // profile.length(piece)}", f"optim.lr={lr:g}", f"optim.sched.min_lr={lr / 10:g}",
            f"optim.sched.warmup_steps={steps // 10}", "trainer.precision=bf16-mixed",
            f"trainer.accelerator={profile.accelerator}", "trainer.enable_progress_bar=false", "+optim.fused=true",
            f"exp_manager.checkpoint_callback_params.every_n_train_steps={min(50, steps)}",
        ]  # fmt: skip

    def trained_on(self, piece: str) -> dict[str, int]:
        """Steps and tokens of a distillation."""
        last = read_log(metrics_in(Workspace(self.workspace(piece)).student))[-1]
        return {"steps": last["step"], "tokens": last["tokens"]}

    def write(self, piece: str, found: Mapping[str, Any]) -> None:
        """Writes benchmarks/results/real-PROFILE-PIECE.json."""
        RESULTS.mkdir(exist_ok=True)
        told = {
            "piece": piece, "date": datetime.date.today().isoformat(), "profile": self.profile.name,
            **machine(self.profile.accelerator), "text": json.loads((self.root / "text/made_from.json").read_text()),
            **found, "seconds": {name: s for name, s in self.seconds.items() if name.startswith(f"{piece} ")},
        }  # fmt: skip
        path = result_of(self.profile, piece)
        path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{piece}: {path}", flush=True)


def result_of(profile: Profile, piece: str) -> Path:
    """The file of a piece's results."""
    return RESULTS / f"real-{profile.name}-{piece}.json"


def machine(accelerator: str) -> dict[str, Any]:
    """What was computed on, without names of machines."""
    told = conditions("cuda" if accelerator == "gpu" else "cpu")
    name = str(told["machine"]).partition(",")[0]
    cores = os.cpu_count()
    with contextlib.suppress(AttributeError):
        cores = len(os.sched_getaffinity(0))
    return {"machine": name, "cores": cores, "torch": told["torch"], "transformers": version("transformers")}  # fmt: skip
