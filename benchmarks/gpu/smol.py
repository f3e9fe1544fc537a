"""A distillation of SmolLM2-135M's shape with random weights: what ``train`` and ``profile`` measure."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.compose import load_config
from nemo_minitron.config.config import Config
from nemo_minitron.data.tokenizer import train_tokenizer
from nemo_minitron.models.causal_lm import new_model, save_model, stored_config
from nemo_minitron.stages.run import run_stage

SHAPE = {
    "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}  # fmt: skip
TINY = {**SHAPE, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        shape: the teacher's config.json.
        cut: overrides that say what the student is.
        positions: tokens of a sample.
        samples: samples of a step.
        steps: how many are trained; the first third does not count.
        text: bytes of text.
    """

    shape: dict[str, Any]
    cut: tuple[str, ...]
    positions: int
    samples: int
    steps: int
    text: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.positions * self.samples


BIG = Job(SHAPE, ("plan.ffn=1024", "plan.drop_layers=[24,25,26,27]"), 1024, 32, 60, 8_000_000)
SMALL = Job(TINY, ("plan.ffn=96", "plan.drop_layers=[2]"), 32, 4, 12, 400_000)


def job_of(tiny: bool) -> Job:
    """``--try`` trains the small one."""
    return SMALL if tiny else BIG


def teacher_at(place: Path, job: Job) -> Path:
    """Writes the teacher, its tokenizer and its text: Python's standard library."""
    folder, text = place / "teacher", place / "text.txt"
    folder.mkdir(parents=True)
    found = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    parts, size = [], 0
    for path in (each for each in found if "site-packages" not in each.parts):
        if size < job.text:
            parts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(parts[-1])
    text.write_text("\n\n".join(parts), encoding="utf-8")
    train_tokenizer(parts[:40], 512, folder)
    model = new_model(job.shape, seed=0)
    save_model(model.to(torch.bfloat16), folder, stored_config(model, job.shape))
    return folder


def pruned_at(place: Path, job: Job, device: str) -> Config:
    """The configuration of the distillation, after everything that comes before it."""
    config = load_config(
        "config",
        [
            f"workspace={place}/run", f"source.model={teacher_at(place, job)}", f"data.train.paths=[{place}/text.txt]",
            f"data.train.sequence_length={job.positions}", f"data.validation.sequence_length={job.positions}",
            f"data.validation.samples={2 * job.samples}", f"data.calibration.sequence_length={job.positions}",
            "data.calibration.samples=4", "score.importance=magnitude", "score.depth=none", *job.cut,
            f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", "trainer.precision=bf16-mixed",
            f"trainer.max_steps={job.steps}", f"trainer.val_check_interval={job.steps}", "optim.sched.warmup_steps=4",
            f"trainer.log_every_n_steps={job.steps // 6}", "trainer.enable_progress_bar=false",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=100000",
            f"distill.batch_size={job.samples}",
        ],
    )  # fmt: skip
    for stage in ("download", "score", "plan", "prune"):
        run_stage(stage, config)
    return config
