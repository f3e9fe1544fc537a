"""Pruning against copying the result: a 2 GB sharded Llama-shaped checkpoint, made on the spot."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.duel import duel, show
from nemo_minitron.artifacts.checkpoint import open_checkpoint
from nemo_minitron.artifacts.manifest import write_json
from nemo_minitron.artifacts.weights import Planned, write_weights
from nemo_minitron.core.cut import Cut
from nemo_minitron.core.select import select_units
from nemo_minitron.families import axis_sizes, expected_tensors, families
from nemo_minitron.stages.prune import write_pruned

SHAPE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "dtype": "bfloat16",
}  # fmt: skip


def make(folder: Path) -> Path:
    """Writes the source checkpoint in shards of 500 MB."""
    folder.mkdir()
    planned = [
        Planned(name, torch.bfloat16, shape)
        for name, _, shape in expected_tensors(families()["llama"], SHAPE)
    ]
    shapes = {tensor.name: tensor.shape for tensor in planned}
    write_weights(folder, planned, lambda name: torch.randn(shapes[name]).bfloat16(), 500_000_000)
    write_json(folder / "config.json", SHAPE)
    return folder


def cut_of(source: Path, width: bool) -> Cut:
    """Half of the FFN, three quarters of hidden and half of the heads; or every second layer."""
    checkpoint = open_checkpoint(source)
    sizes = axis_sizes(checkpoint.family, checkpoint.config)
    if not width:
        return Cut(checkpoint.family, checkpoint.config, {}, tuple(range(0, sizes["layers"], 2)))
    layers = sizes["layers"]
    scores = {
        "hidden": torch.rand(sizes["hidden"]),
        "ffn": torch.rand(layers, sizes["ffn"]),
        "heads": torch.rand(layers, sizes["heads"]),
    }
    targets = {**sizes, "hidden": 1536, "ffn": 2816, "heads": 16}
    keep = select_units(checkpoint.family, scores, sizes, targets)
    return Cut(checkpoint.family, checkpoint.config, keep, tuple(range(layers)))


def prune(source: Path, target: Path, width: bool) -> None:
    """Prunes into an empty folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    write_pruned(open_checkpoint(source), cut_of(source, width), target, 500_000_000)


def copy(source: Path, target: Path) -> None:
    """``cp -r`` of a finished result."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)


def peak_megabytes(source: Path, target: Path) -> float:
    """Peak resident memory of a process that prunes, beyond what its imports take.

    Anonymous memory only: pages of the mapped source are the kernel's to drop.
    """
    code = (
        "import sys; from pathlib import Path; import benchmarks.prune as p, torch\n"
        "torch.ones(256, 256) @ torch.ones(256, 256)\n"
        "import threading, time\n"
        "def anon(): return int([l for l in open('/proc/self/status') if l.startswith('RssAnon')][0].split()[1])\n"
        "base = peak = anon(); stop = False\n"
        "def watch():\n"
        "    global peak\n"
        "    while not stop: peak = max(peak, anon()); time.sleep(0.005)\n"
        "t = threading.Thread(target=watch); t.start()\n"
        "p.prune(Path(sys.argv[1]), Path(sys.argv[2]), True); stop = True; t.join()\n"
        "print((peak - base) / 1024)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, source, target], capture_output=True, text=True, check=True
    )
    return float(out.stdout.splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = make(work / "source")
        for width, aim in ((True, 2.0), (False, 1.2)):
            prune(source, work / "pruned", width)
            kind = "width" if width else "depth"
            seconds = duel(
                {
                    "cp of the result": lambda: copy(work / "pruned", work / "copy"),
                    "prune": lambda width=width: prune(source, work / "again", width),
                },
                3,
            )
            size = sum(path.stat().st_size for path in (work / "pruned").iterdir())
            more = {"result_bytes": size}
            if width:
                more["peak_megabytes"] = round(peak_megabytes(source, work / "measured"))
            show(f"prune-{kind}", "cp of the result", seconds, {"prune": aim}, **more)


if __name__ == "__main__":
    main()
