"""The stream writes what slicing in memory gives, reads no more than survives, and dies without a trace."""

import errno
import os
import random
import resource
import signal
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.checkpoints.shard_writer import Planned, ShardWriter, write_weights
from nemo_minitron.families import Architecture, families
from nemo_minitron.proofs.proof import TOGETHER, halved
from nemo_minitron.proofs.tiny_models import permutation, tiny_model
from nemo_minitron.pruning import stream
from nemo_minitron.pruning.select import score_shape, select_units
from nemo_minitron.pruning.slice import Cut, cut_tensor, pieces
from nemo_minitron.pruning.stream import planned_bytes, write_pruned
from nemo_minitron.scoring.importance import random_scores
from nemo_minitron.workspace.manifest import hash_file, write_json
from tests.support.processes import until
from tests.support.runs import minitron, started


def half_of_everything(checkpoint, seed=0, layers=(1, 3)):
    family, sizes = checkpoint.family, checkpoint.architecture.sizes
    present = checkpoint.architecture.present
    targets = halved(family, sizes, TOGETHER, [axis for axis in family.prunable if axis in present])
    scores = {
        axis: random_scores(score_shape(family, sizes, axis), seed) for axis in family.prunable
    }
    keep = select_units(family, scores, sizes, {k: v for k, v in targets.items() if k != "layers"})
    return Cut(checkpoint.architecture, keep, layers)


def run(checkpoint, cuts, work, shard_bytes=10**9):
    folders = [work / f"{i}" for i in range(len(cuts))]
    for folder in folders:
        folder.mkdir(parents=True)
    hashes = write_pruned(checkpoint, list(zip(folders, cuts, strict=True)), shard_bytes)
    return folders, hashes


def all_tensors(folder):
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def retype(folder, dtypes):
    """Stores the tensors of a model in these dtypes, in turn, over several files."""
    tensors = load_file(folder / "model.safetensors")
    for i, name in enumerate(tensors):
        tensors[name] = tensors[name].to(dtypes[i % len(dtypes)])
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, start in enumerate(range(0, len(tensors), 7)):
        names = list(tensors)[start : start + 7]
        save_file(
            {n: tensors[n] for n in names}, folder / f"part-{i}.safetensors", {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, f"part-{i}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


@pytest.mark.parametrize("block", [1, 300, 2 * 2**20])
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("llama", [torch.bfloat16]),
        ("phi3", [torch.float16]),
        ("gemma2", [torch.bfloat16, torch.float32]),
        ("qwen3_moe", [torch.float32, torch.float64, torch.float16]),
        ("gpt_oss", [torch.bfloat16]),
        ("nemotron_h", [torch.bfloat16, torch.float32]),
    ],
)
def test_the_stream_equals_slices_in_memory_whatever_blocks_shards_and_dtypes(
    tmp_path, monkeypatch, name, dtypes, block
):
    pytest.importorskip(f"transformers.models.{name}")
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(stream, "GAP_BYTES", block // 4)
    family = families()[name]
    checkpoint = open_checkpoint(
        retype(tiny_model(family, family.proofs[0], tmp_path / "m"), dtypes)
    )
    turned = permutation(checkpoint.architecture, [a for a in family.prunable if a != "layers"])
    read = partial(load_tensor, checkpoint)
    for i, cut in enumerate(
        (half_of_everything(checkpoint), Cut(checkpoint.architecture, turned, (0, 1, 2, 3)))
    ):
        seen = []
        target = tmp_path / f"cut{i}"
        target.mkdir()
        (hashes,) = write_pruned(checkpoint, [(target, cut)], 3000, seen.append)
        found = all_tensors(target)
        expected = {
            piece.name: cut_tensor(read(piece.source), piece, cut.before)
            for piece in pieces(cut, list(checkpoint.entries))
        }
        assert set(found) == set(expected)
        for tensor_name, tensor in expected.items():
            assert found[tensor_name].dtype == tensor.dtype
            assert torch.equal(found[tensor_name], tensor), tensor_name
        assert {path.name: hash_file(path) for path in target.glob("*.safetensors")} == hashes
        assert len(hashes) > 2
        assert sum(seen) == planned_bytes(checkpoint, cut) == sum(t.nbytes for t in found.values())


BIG = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """74 MB: large beside headers and side files."""
    folder = tmp_path_factory.mktemp("big")
    shapes = {name: shape for name, _, shape in Architecture(families()["llama"], BIG).tensors()}
    generator = torch.Generator().manual_seed(0)
    write_weights(
        folder,
        [Planned(name, "BF16", shape) for name, shape in shapes.items()],
        lambda name: torch.randn(shapes[name], generator=generator).bfloat16(),
        20_000_000,
    )
    write_json(folder / "config.json", BIG)
    return folder


def bytes_read(call):
    def so_far():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = so_far()
    call()
    return so_far() - before


needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does"
)


@needs_proc
def test_two_plans_read_the_source_once_and_give_what_each_gives_alone(tmp_path, big):
    checkpoint = open_checkpoint(big)
    half = {"ffn": torch.arange(1, 2048, 2).expand(8, -1)}
    cuts = [
        Cut(checkpoint.architecture, half, tuple(range(8))),
        Cut(checkpoint.architecture, {"hidden": torch.arange(384)}, (0, 1, 2, 5, 6, 7)),
    ]
    size = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    together = bytes_read(lambda: run(checkpoint, cuts, tmp_path / "together"))
    alone = bytes_read(
        lambda: [run(checkpoint, [cut], tmp_path / f"{i}") for i, cut in enumerate(cuts)]
    )
    assert together < 1.02 * size
    assert alone > 1.5 * size
    for i in range(2):
        for path in (tmp_path / "together" / f"{i}").iterdir():
            assert path.read_bytes() == (tmp_path / f"{i}" / "0" / path.name).read_bytes()


@needs_proc
def test_only_what_survives_is_read(tmp_path, big):
    checkpoint = open_checkpoint(big)
    first_half = {"ffn": torch.arange(1024).expand(8, -1)}
    for i, cut in enumerate(
        (
            Cut(checkpoint.architecture, {}, (0, 3)),
            Cut(checkpoint.architecture, first_half, (4,)),
        )
    ):
        read = bytes_read(lambda cut=cut, i=i: run(checkpoint, [cut], tmp_path / f"{i}"))
        # rows of gate and up are left out on disk; of down_proj [hidden, ffn] every row has survivors
        down = 512 * 1024 * 2 * len(cut.layers) if cut.keep else 0
        assert read < 1.02 * (planned_bytes(checkpoint, cut) + down) + 100_000


def test_a_disk_without_room_is_said_before_a_byte_is_written(tmp_path):
    with pytest.raises(
        OSError, match=r"no space left: .* needs 9,007,199,254,740,992 bytes"
    ) as caught:
        ShardWriter(tmp_path, [Planned("w", "F32", (2**51,))], 10**9)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_ends_early_is_an_error_and_not_zeros(tmp_path, big):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(big, copy)
    checkpoint = open_checkpoint(copy)
    path = sorted(copy.glob("*.safetensors"))[-1]
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(OSError, match=r"ends .* bytes early"):
        run(checkpoint, [Cut(checkpoint.architecture, {}, tuple(range(8)))], tmp_path / "out")


def asked(source, workspace, *more):
    return ["prune", f"workspace={workspace}", f"source.model={source}", "score.importance=random",
            "plan.ffn=1024", "plan.hidden=384", *more]  # fmt: skip


def test_a_full_disk_is_one_clear_line_and_no_debris(tmp_path, big):
    """The limit on a file's size strikes in the middle of a write, as a full disk does."""
    words = asked(big, tmp_path / "ws")
    process = started(*words)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (9_000_000, 9_000_000))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    line = err.splitlines()[-1]
    assert line.startswith("minitron prune: "), err
    assert "File too large" in line
    assert "model.safetensors" in line
    assert "Traceback" not in err
    left = {path.name for path in (tmp_path / "ws").iterdir()}
    assert left == {".lock", ".stage.lock", "commands.jsonl", "teacher", "scores", "plan"}
    again = minitron(*words)
    assert again.returncode == 0, again.stderr
    assert minitron("verify", str(tmp_path / "ws")).returncode == 0


def test_killed_at_any_byte_nothing_looks_finished_and_the_next_run_finishes(tmp_path, big):
    whole = tmp_path / "whole"
    assert minitron(*asked(big, whole)).returncode == 0
    expected = {path.name: hash_file(path) for path in (whole / "pruned").glob("model*")}
    draw, workspace, killed = random.Random(time.time_ns()), tmp_path / "ws", 0
    for _ in range(4):
        process = started(*asked(big, workspace))
        partial = workspace / ".pruned.partial"
        until(lambda: process.poll() is not None or partial.exists(), every=0.001)  # noqa: B023
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        finished = (workspace / "pruned").exists()
        assert finished == (not partial.exists())
        if finished:
            break
    assert killed > 0
    assert minitron(*asked(big, workspace)).returncode == 0
    assert {
        path.name: hash_file(path) for path in (workspace / "pruned").glob("model*")
    } == expected
    assert minitron("verify", str(workspace)).returncode == 0
    assert not (workspace / ".pruned.partial").exists()
