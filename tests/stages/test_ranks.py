"""Training on two ranks over gloo: the loss curve of one rank with as many samples a step, resumed after a kill."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.artifacts.log import read_log
from nemo_minitron.cli import main
from tests.stages.test_score import ended
from tests.test_cli import refused


@pytest.fixture
def words(teacher, corpus):
    return [
        f"source.model={teacher}", f"data.train.paths=[{corpus}]", "data.train.sequence_length=16",
        "data.validation.sequence_length=16", "data.validation.samples=16", "data.train.samples=96",
        "score.importance=magnitude", "plan.ffn=20", "trainer.max_steps=6", "trainer.val_check_interval=3",
        "trainer.accelerator=cpu", "optim.sched.warmup_steps=1", "trainer.log_every_n_steps=1",
        "distill.ce=0.1", "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
    ]  # fmt: skip


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
            "nemo_minitron", *arguments]  # fmt: skip


def kill_all(number):
    """As when a machine fails: torchrun's ranks have sessions of their own and outlive it otherwise."""
    for process in [psutil.Process(number), *psutil.Process(number).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def curve(place):
    lines = read_log(place / "student" / "metrics.jsonl")
    clocked = ("tokens_per_second", "tflops")
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def weights(place):
    return load_file(place / "student" / "hf" / "model.safetensors")


def test_two_ranks_have_the_loss_curve_of_one(capsys, tmp_path, words):
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        assert main(["prune", f"workspace={place}", *words]) == 0
    assert main(["distill", f"workspace={one}", *words, "distill.batch_size=4"]) == 0
    done = ended(torchrun("distill", f"workspace={two}", *words, "distill.batch_size=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("distill: 6 steps") == 1
    lines, expected = curve(two), curve(one)
    assert len(lines) == len(expected) == 8
    for found, wanted in zip(lines, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for name, tensor in weights(one).items():
        assert torch.allclose(weights(two)[name], tensor, atol=1e-6), name
    assert main(["verify", str(two)]) == 0
    # once more: it is there
    again = ended(torchrun("distill", f"workspace={two}", *words, "distill.batch_size=2", "--json"))
    assert again.returncode == 0 and json.loads(again.stdout)["made"] is False


def test_two_ranks_killed_go_on_bit_for_bit(tmp_path, words):
    words = [*words, "trainer.max_steps=60", "distill.batch_size=2", "trainer.val_check_interval=60"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for place in (straight, killed):
        assert main(["prune", f"workspace={place}", *words]) == 0
    assert ended(torchrun("distill", f"workspace={straight}", *words)).returncode == 0
    process = subprocess.Popen(
        torchrun("distill", f"workspace={killed}", *words), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = killed / "student" / "state" / "nemo" / "checkpoints"
    while process.poll() is None and not any(checkpoints.glob("*step=1?.ckpt")):
        time.sleep(0.01)
    kill_all(process.pid)
    process.wait()
    assert not (killed / "student" / "manifest.json").exists()
    done = ended(torchrun("distill", f"workspace={killed}", *words))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(killed)[name], tensor), name
    assert curve(killed) == curve(straight)


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_saves_the_step_and_ends(tmp_path, words, ranks, number):
    words = [*words, "trainer.max_steps=200", "distill.batch_size=2", "trainer.val_check_interval=200",
             "trainer.accumulate_grad_batches=2",
             "exp_manager.checkpoint_callback_params.every_n_train_steps=1000"]  # fmt: skip
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for place in (straight, stopped):
        assert main(["prune", f"workspace={place}", *words]) == 0

    def command(place):
        arguments = ["distill", f"workspace={place}", *words]
        return torchrun(*arguments) if ranks == 2 else [sys.executable, "-m", "nemo_minitron", *arguments]

    process = subprocess.Popen(command(stopped), start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = stopped / "student" / "state" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") > 5):
        time.sleep(0.01)
    process.send_signal(number)  # torchrun hands it on to its ranks
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (stopped / "student" / "manifest.json").exists()
    (saved,) = (stopped / "student" / "state" / "nemo" / "checkpoints").glob("*.ckpt")
    step = int(saved.stem.removeprefix("step="))
    assert step == read_log(log)[-1]["step"] and 5 < step < 200
    if ranks == 1:
        assert f"stopped by {signal.Signals(number).name} at step {step} of 200, which is saved" in err
    for place in (stopped, straight):
        done = ended(command(place))
        assert done.returncode == 0, done.stderr[-2000:]
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(stopped)[name], tensor), name
    assert curve(stopped) == curve(straight)


def test_devices_nobody_started_and_flows_under_torchrun_are_refused(capsys, monkeypatch, tmp_path, words):
    place = f"workspace={tmp_path / 'ws'}"
    assert main(["prune", place, *words]) == 0
    capsys.readouterr()
    line = refused(capsys, "distill", place, *words, "trainer.devices=2")
    assert "start several with torchrun --nproc-per-node N -m nemo_minitron" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(capsys, "run", place, *words)
    assert (
        "not under torchrun; run the stages that compute with it: pretrain, correct, score, distill" in line
    )
