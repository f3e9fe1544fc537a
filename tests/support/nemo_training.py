"""Trainings through NeMo without a stage around them."""

import torch

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.families import families
from nemo_minitron.losses.fused_linear_loss import LossWeights
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.plugin.trainer import Options, TrainingSettings, newest_checkpoint, train
from nemo_minitron.workspace.training_log import read_log
from tests.support.processes import until
from tests.support.runs import started

ALL = ("embedding", "hidden", "mlp_input", "attention")


def distillation(teacher, intermediate, family="llama", weights=None, kept_H=None):
    return KnowledgeDistillation(
        load_model(teacher),
        families()[family],
        weights or LossWeights(),
        intermediate=intermediate,
        kept_H=kept_H,
    )


OPTIM = {
    "name": "adamw",
    "lr": 2e-2,
    "sched": {"name": "CosineAnnealing", "warmup_steps": 2, "min_lr": 1e-4},
}


EXP = {
    "create_tensorboard_logger": False,
    "create_checkpoint_callback": True,
    "checkpoint_callback_params": {
        "filename": "{step}", "monitor": "step", "mode": "max", "save_top_k": 1, "save_last": False,
        "every_n_train_steps": 3, "every_n_epochs": None, "save_nemo_on_train_end": False,
    },
    "log_step_timing": False, "log_tflops_per_sec_per_gpu": False, "seconds_to_sleep": 0,
}  # fmt: skip


def recipe(steps, options=None, **trainer):
    settings = {
        "max_steps": steps, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }  # fmt: skip
    return TrainingSettings({**settings, **trainer}, OPTIM, EXP, 4, 0, options or Options())


def tokens(count=40, length=17, seed=0):
    """Counting sequences: next token = token + 1, learnable in a few steps."""
    start = torch.randint(0, 60, (count, 1), generator=torch.Generator().manual_seed(seed))
    return start + torch.arange(length)


def run(folder, state, steps, callbacks=(), skipped=frozenset(), **trainer):
    state.mkdir(exist_ok=True)
    config = read_config(folder)
    model = load_model(folder, dtype=torch.float32)
    return train(
        model,
        config,
        folder,
        recipe(steps, **trainer),
        tokens(),
        tokens(8, seed=1),
        state,
        callbacks,
        skipped,
    )


def timeless(state):
    """The training log without what the clock decides."""
    lines = read_log(state / "metrics.jsonl")
    clocked = ("tokens_per_second", "tflops")
    return [{name: value for name, value in line.items() if name not in clocked} for line in lines]


def killed_behind_a_checkpoint(workspace, *words):
    """Kills a distillation as soon as it has saved its state; the state that is there then."""
    folder = workspace / "student" / "state" / "nemo" / "checkpoints"
    process = started("distill", f"workspace={workspace}", *words)
    until(lambda: process.poll() is not None or newest_checkpoint(folder), every=0.01)
    process.kill()
    process.wait()
    return newest_checkpoint(folder)
