"""Real, tiny parts for the tests: models with every weight at unit scale, a trained tokenizer, text."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="minitron-prefect-"))

import psutil
import pytest
import torch
import transformers
from filelock import FileLock

from nemo_minitron.bridge.specimens import random_model

transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "file",
    "and",
    "writes",
    "the",
    "answer",
    "to",
    "another",
    "file",
    "while",
    "the",
    "reader",
    "waits",
    "for",
    "the",
    "next",
    "line",
    "of",
    "text",
    "because",
    "every",
    "stage",
    "leaves",
    "an",
    "artifact",
    "that",
    "names",
    "its",
    "inputs",
    "and",
    "can",
    "be",
    "checked",
    "again",
]


def make_model(folder: Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model, small enough for a test; every special token lies inside the vocabulary."""
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    return random_model({"model_type": model_type, **SIZES, **tokens, **changes}, folder, seed)


def logits(folder: Path, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a saved model, float32, after a strict load."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    tokens = torch.arange(20)[None] % model.config.vocab_size if tokens is None else tokens
    with torch.inference_mode():
        return model.eval()(tokens).logits


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    def build(model_type: str = "llama", name: str = "model", **changes: Any) -> Path:
        return make_model(tmp_path / name, model_type, **changes)

    return build


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Fills a folder that all test processes share; the first of them to need it does."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "shared"
    shared.mkdir(exist_ok=True)

    def fill(name: str, build: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.done").exists():
                (shared / name).mkdir()
                build(shared / name)
                (shared / f"{name}.done").touch()
        return shared / name

    return fill


@pytest.fixture(scope="session")
def corpus(once: Callable[..., Path]) -> Path:
    """Forty small documents of words with a grammar simple enough to be learnt in seconds."""
    import random

    def write(folder: Path) -> None:
        draw = random.Random(0)
        for i in range(40):
            lines = [" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(40)]
            (folder / f"doc{i:02d}.txt").write_text("\n".join(lines))

    return once("corpus", write)


@pytest.fixture(scope="session")
def tokenizer_folder(once: Callable[..., Path], corpus: Path) -> Path:
    from nemo_minitron.bridge.tokenizer import train_tokenizer

    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    return once("tokenizer", lambda folder: train_tokenizer(texts, 300, folder))


@pytest.fixture(scope="session")
def teacher(once: Callable[..., Path], tokenizer_folder: Path) -> Path:
    """A small random Llama with a tokenizer beside it."""

    def make(folder: Path) -> None:
        make_model(folder, "llama", vocab_size=300)
        for path in tokenizer_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    return once("teacher", make)


def stream(
    source: Path, target: Path, keep: dict[str, torch.Tensor], layers: tuple[int, ...] | None = None
) -> Path:
    """Cuts a saved model through the streaming writer."""
    from nemo_minitron.artifacts.checkpoint import open_checkpoint
    from nemo_minitron.artifacts.pruned import write_pruned
    from nemo_minitron.core.cut import Cut
    from nemo_minitron.families import axis_sizes

    checkpoint = open_checkpoint(source)
    every = range(axis_sizes(checkpoint.family, checkpoint.config)["layers"])
    target.mkdir()
    cut = Cut(checkpoint.family, checkpoint.config, keep, tuple(every) if layers is None else layers)
    write_pruned(checkpoint, [(target, cut)], 10**9)
    return target


def minitron(
    *arguments: str, cwd: Path | None = None, timeout: int = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "nemo_minitron", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        check=False,
    )


def command_line(process: psutil.Process) -> str:
    """What a process runs; nothing where it has ended or waits to be reaped."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def settings(workspace: Path, teacher: Path, corpus: Path) -> list[str]:
    """Overrides of a whole run that takes seconds."""
    return [
        f"workspace={workspace}", f"source.model={teacher}", f"data.train.paths=['{corpus}']", "data.holdout=0.2",
        "data.train.sequence_length=16", "data.calibration.sequence_length=16", "data.calibration.samples=20",
        "data.validation.sequence_length=16", "data.validation.samples=16", "plan.hidden=12", "plan.heads=3",
        "plan.ffn=20", "plan.layers=2", "trainer.max_steps=12", "trainer.val_check_interval=4",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=4", "optim.lr=0.005", "optim.sched.warmup_steps=2",
        "distill.batch_size=4", "evaluate.from_scratch=true", "evaluate.tasks=[held_out_choice,held_out_bytes]",
        "evaluate.prompt_tokens=16", "evaluate.new_tokens=4", "evaluate.task_limit=20",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished(once: Callable[..., Path], teacher: Path, corpus: Path) -> tuple[Path, str]:
    """A workspace that 'minitron run' has finished, and what it printed."""

    def run(folder: Path) -> None:
        done = minitron("run", *settings(folder / "run", teacher, corpus), timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "printed.txt").write_text(done.stdout)

    folder = once("finished", run)
    return folder / "run", (folder / "printed.txt").read_text()
