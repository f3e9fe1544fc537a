"""Real, tiny parts for the tests: models with every weight at unit scale, a trained tokenizer, text."""

import contextlib
import gc
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import transformers
from filelock import FileLock

from nemo_minitron.cli.main import main
from nemo_minitron.data import chat_template_process
from nemo_minitron.launch.start_up import load_scipy_signal_later
from nemo_minitron.release import quickstart
from tests.support import forked_trials, left_behind, runs
from tests.support.certificate import one_certificate
from tests.support.fuzzing import examples
from tests.support.models import WORDS, make_model
from tests.support.runs import minitron, settings

load_scipy_signal_later()  # as commands do
# threads to read a tiny model cost more than to read it; 'make demo' reads as users do
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
transformers.logging.disable_progress_bar()
# no test speaks TLS, and Prefect makes hundreds of clients; test processes inherit the file of the first
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["SSL_CERT_FILE"] = str(one_certificate())
# what hypothesis takes for slow, and for too slow, is how busy the machine is; 'make test' draws the same examples each
# time, as a change must not fail by what it did not touch, and 'make fuzz' draws others
hypothesis.settings.register_profile(
    "any_machine",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="FUZZ" not in os.environ,
    max_examples=examples(100),
)
hypothesis.settings.load_profile("any_machine")


def pytest_configure(config: pytest.Config) -> None:
    # as a plugin, for fixtures of the whole session belong to no folder
    config.pluginmanager.register(left_behind)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collects tests without looking for garbage: it imports all there is, and there is none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def _keep_what_is_there() -> None:
    """Libraries and tests stay: to look for garbage among all of them takes a quarter of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    _keep_what_is_there()


_begun = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What libraries import when they are first used stays too; most of it comes early."""
    global _begun
    _begun += 1
    if _begun in (10, 30, 90, 270, 540, 810, 1080):
        _keep_what_is_there()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets what takes long begin first, so that at the end there are short tests for every worker."""
    items.sort(key=lambda item: item.path.parent.name not in ("flows", "launch"))


@pytest.fixture(autouse=True)
def _exports_and_chat_templates_are_tried_in_forks(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in tests of these processes themselves: in tests/release, and of chat templates."""
    if request.path.parent.name == "release":
        return
    monkeypatch.setenv(forked_trials.PLACE, str(_shared(tmp_path_factory) / "trials"))
    monkeypatch.setattr(quickstart, "subprocess", forked_trials)
    if request.path.stem != "test_chat_template":
        monkeypatch.setattr(chat_template_process, "subprocess", forked_trials)


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    def build(model_type: str = "llama", name: str = "model", **changes: Any) -> Path:
        return make_model(tmp_path / name, model_type, **changes)

    return build


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes share."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fills a folder that all test processes share; the first of them to need it does."""
    shared = _shared(tmp_path_factory)

    def fill(name: str, build: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.done").exists():
                shutil.rmtree(shared / name, ignore_errors=True)  # of one that failed at it
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
def mixture(once: Callable[..., Path], tokenizer_folder: Path) -> Path:
    """A small random mixture of experts with a tokenizer beside it."""

    def make(folder: Path) -> None:
        sizes = {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2}
        make_model(folder, "mixtral", vocab_size=300, **sizes)
        for path in tokenizer_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    return once("mixture", make)


@pytest.fixture
def words(once: Callable[..., Path], teacher: Path, corpus: Path) -> list[str]:
    """Overrides of a training of six steps."""
    words = [
        f"source.model={teacher}", f"data.train.paths=[{corpus}]", "data.train.sequence_length=16",
        "data.validation.sequence_length=16", "data.validation.samples=16", "data.train.samples=96",
        "score.importance=magnitude", "plan.ffn=20", "trainer.max_steps=6", "trainer.val_check_interval=3",
        "trainer.accelerator=cpu", "optim.sched.warmup_steps=1", "trainer.log_every_n_steps=1",
        "distill.ce=0.1", "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
    ]  # fmt: skip

    def score(folder: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(["score", f"workspace={folder / 'run'}", *words]) == 0

    runs.scored[:] = [once("scored", score) / "run"]
    return words


@pytest.fixture
def words_often(words: list[str]) -> list[str]:
    """Overrides of a training without a number of steps of its own, whose state is saved often."""
    return [
        *words, "data.validation.samples=8", "trainer.val_check_interval=100", "distill.batch_size=2", "distill.ce=0",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=7",
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
