"""Training on two ranks over gloo: the loss curve of one rank with as many samples a step, resumed after a kill."""

import json
import signal
import subprocess

import pytest
import torch

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.cli.main import main
from nemo_minitron.families import Architecture, families
from nemo_minitron.plugin.trainer import newest_checkpoint, step_of
from nemo_minitron.training.strategies import tensor_plan
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import make_model
from tests.support.processes import until
from tests.support.runs import kill_group, minitron, prune, refused, started
from tests.support.two_ranks import curve, on_two_ranks, torchrun, two_ranks, weights

SHARD = "training.parallel=shard"
INSIDE = ["distill.intermediate.terms=[hidden,attention]", "distill.intermediate.layers=['-1:-1']",
          "distill.intermediate.relation_heads=2", "plan.hidden=18"]  # fmt: skip


@pytest.mark.parametrize(
    ("batch_size", "more", "tied"),
    [
        (2, [], False),
        (2, [SHARD], True),
        (2, [SHARD, *INSIDE], False),
        (4, [SHARD, "training.tensor_parallel=2", "plan.kv_heads=2"], False),
    ],
)
def test_two_ranks_have_the_loss_curve_of_one(
    capsys, tmp_path, words, tokenizer_folder, batch_size, more, tied
):
    one, two = tmp_path / "one", tmp_path / "two"
    if tied:
        source = make_model(tmp_path / "tied", "llama", vocab_size=300, tie_word_embeddings=True)
        for path in tokenizer_folder.iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        words = [f"source.model={source}", *words[1:]]
    words = [*words, *[word for word in more if word.startswith(("plan", "distill.intermediate"))]]
    more = [*more, f"distill.batch_size={batch_size}"]
    for place in (one, two):
        prune(place, *words)
    assert main(["distill", f"workspace={one}", *words, "distill.batch_size=4"]) == 0
    done = on_two_ranks("distill", f"workspace={two}", *words, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("distill: 6 steps") == 1
    lines, expected = curve(two), curve(one)
    assert len(lines) == len(expected) == 8
    for found, wanted in zip(lines, expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    written = weights(two)
    assert written.keys() == weights(one).keys()  # sharded, too, a tied head is stored once
    for name, tensor in weights(one).items():
        assert torch.allclose(written[name], tensor, atol=1e-6), name
    assert main(["verify", str(two)]) == 0
    if SHARD in more:
        return
    # once more: it is there
    again = on_two_ranks("distill", f"workspace={two}", *words, *more, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["made"] is False


def test_a_sharded_training_goes_on_with_another_number_of_ranks(tmp_path, words):
    words = [*words, "trainer.max_steps=30", "trainer.val_check_interval=30", SHARD]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for place in (straight, killed):
        prune(place, *words)
    assert main(["distill", f"workspace={straight}", *words[:-1], "distill.batch_size=4"]) == 0
    ranks = two_ranks("distill", f"workspace={killed}", *words, "distill.batch_size=2")
    checkpoints = killed / "student" / "state" / "nemo" / "checkpoints"
    until(
        lambda: (
            any(rank.poll() is not None for rank in ranks)
            or (newest_checkpoint(checkpoints) and step_of(newest_checkpoint(checkpoints)) > 9)
        ),
        every=0.01,
    )
    for rank in ranks:
        kill_group(rank)
    saved = newest_checkpoint(checkpoints)
    assert saved.is_dir() and len(list(saved.glob("*.distcp"))) == 2
    before = read_log(killed / "student" / "state" / "metrics.jsonl")
    done = minitron("distill", f"workspace={killed}", *words, "distill.batch_size=4")
    assert done.returncode == 0, done.stderr[-3000:]
    lines, expected = curve(killed), curve(straight)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for found, wanted in zip(lines, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    kept = [line for line in before if line["step"] <= step_of(saved)]
    assert (
        read_log(killed / "student" / "metrics.jsonl")[: len(kept)] == kept
    )  # it did not start over
    for name, tensor in weights(straight).items():
        assert torch.allclose(weights(killed)[name], tensor, atol=1e-5), name


@pytest.mark.parametrize(
    ("family", "parts", "message"),
    [
        ("llama", 3, "does not divide heads=4"),
        (
            "phi3",
            2,
            r"model\.layers\.\{layer\}\.self_attn\.qkv_proj\.weight of phi3 cannot be split",
        ),
        ("qwen3", 2, r"q_norm\.weight of qwen3 cannot be split"),
        ("mixtral", 2, r"gate\.weight of mixtral: experts are not split"),
    ],
)
def test_what_tensor_parallelism_cannot_split_is_refused(tmp_path, family, parts, message):
    config = read_config(
        make_model(tmp_path / "m", family, num_attention_heads=4, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match=message):
        tensor_plan(Architecture(families()[family], config), parts)


SAME = ["trainer.max_steps=50", "trainer.val_check_interval=50", "distill.batch_size=2",
        "trainer.accumulate_grad_batches=2"]  # fmt: skip


@pytest.fixture
def straight(once, words):
    """A training of two ranks that nothing interrupts."""

    def train(folder):
        prune(folder, *words, *SAME)
        assert on_two_ranks("distill", f"workspace={folder}", *words, *SAME).returncode == 0

    return once("straight-on-two-ranks", train)


def test_two_ranks_killed_go_on_bit_for_bit(tmp_path, words, straight):
    words, killed = [*words, *SAME], tmp_path / "killed"
    prune(killed, *words)
    ranks = two_ranks("distill", f"workspace={killed}", *words)
    checkpoints = killed / "student" / "state" / "nemo" / "checkpoints"
    until(
        lambda: (
            any(rank.poll() is not None for rank in ranks) or any(checkpoints.glob("*step=1?.ckpt"))
        ),
        every=0.01,
    )
    for rank in ranks:
        kill_group(rank)
    assert not (killed / "student" / "manifest.json").exists()
    done = on_two_ranks("distill", f"workspace={killed}", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(killed)[name], tensor), name
    assert curve(killed) == curve(straight)


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_saves_the_step_and_ends(tmp_path, words, straight, ranks, number):
    words = [*words, *SAME, "exp_manager.checkpoint_callback_params.every_n_train_steps=1000"]
    stopped = tmp_path / "stopped"
    prune(stopped, *words)

    arguments = ("distill", f"workspace={stopped}", *words)
    process = started(*arguments) if ranks == 1 else subprocess.Popen(
        torchrun(*arguments), start_new_session=True, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    log = stopped / "student" / "state" / "metrics.jsonl"
    until(
        lambda: process.poll() is not None or (log.is_file() and log.read_text().count("\n") > 5),
        every=0.01,
    )
    process.send_signal(number)  # torchrun hands it on to its ranks
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (stopped / "student" / "manifest.json").exists()
    (saved,) = (stopped / "student" / "state" / "nemo" / "checkpoints").glob("*.ckpt")
    step = int(saved.stem.removeprefix("step="))
    assert step == read_log(log)[-1]["step"] and 5 < step < 50
    if ranks == 1:
        assert (
            f"stopped by {signal.Signals(number).name} at step {step} of 50, which is saved" in err
        )
        straight = tmp_path / "straight"
        for place in (stopped, straight):
            prune(place, *words)
            assert main(["distill", f"workspace={place}", *words]) == 0
    else:
        done = on_two_ranks("distill", f"workspace={stopped}", *words)
        assert done.returncode == 0, done.stderr[-2000:]
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(stopped)[name], tensor), name
    assert curve(stopped) == curve(straight)


def test_devices_nobody_started_and_flows_under_torchrun_are_refused(
    capsys, monkeypatch, tmp_path, words
):
    place = f"workspace={tmp_path / 'ws'}"
    assert main(["prune", place, *words]) == 0
    capsys.readouterr()
    line = refused(capsys, "distill", place, *words, "trainer.devices=2")
    assert "start several with torchrun --nproc-per-node N -m nemo_minitron" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(capsys, "run", place, *words)
    assert (
        "not under torchrun; run the stages that compute with it: pretrain, correct, score, screen, "
        "sensitivity, logits, distill, evaluate" in line
    )
