"""Real, tiny parts for the tests: models with every weight at unit scale, a trained tokenizer, text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import transformers
from filelock import FileLock

from tests.support.models import WORDS, make_model
from tests.support.runs import minitron, settings

transformers.logging.disable_progress_bar()
# what hypothesis takes for slow, and for too slow, is how busy the machine is
hypothesis.settings.register_profile(
    "any_machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any_machine")


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
    from nemo_minitron.data.tokenizer import train_tokenizer

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


@pytest.fixture(scope="session")
def finished(once: Callable[..., Path], teacher: Path, corpus: Path) -> tuple[Path, str]:
    """A workspace that 'minitron run' has finished, and what it printed."""

    def run(folder: Path) -> None:
        done = minitron("run", *settings(folder / "run", teacher, corpus), timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "printed.txt").write_text(done.stdout)

    folder = once("finished", run)
    return folder / "run", (folder / "printed.txt").read_text()
