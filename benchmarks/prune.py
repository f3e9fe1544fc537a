"""Pruning against copying the result: a 2 GB sharded Llama-shaped checkpoint, made on the spot.

Beside ``cp`` stands ``cp`` and ``sha256sum`` of the copy, for a result here carries its hashes; and mergekit's
layer slice of the same model, installed in an environment of its own. ``python -m benchmarks.prune [FOLDER]`` keeps
that environment in FOLDER.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

from benchmarks.duel import duel, show
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.shard_writer import Planned, write_weights
from nemo_minitron.families import architecture_of
from nemo_minitron.pruning.select import select_units
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.workspace.manifest import write_json

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "dtype": "bfloat16", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
SHARD = 500_000_000
MERGEKIT = "mergekit==0.1.5"


def make_checkpoint(folder: Path, shape: dict[str, Any], name: str, dtype: torch.dtype) -> Path:
    """Writes a random Llama of a shape in shards of 500 MB."""
    folder.mkdir()
    shapes = {tensor: size for tensor, _, size in architecture_of(shape).tensors()}
    planned = [Planned(tensor, name, size) for tensor, size in shapes.items()]
    write_weights(
        folder, planned, lambda tensor: (torch.randn(shapes[tensor]) * 0.02).to(dtype), SHARD
    )
    write_json(folder / "config.json", shape)
    return folder


def cut_of(source: Path, width: bool, depth: bool) -> Cut:
    """Half of the FFN, three quarters of hidden and half of the heads; every second layer; or both."""
    checkpoint = open_checkpoint(source)
    sizes = checkpoint.architecture.sizes
    layers = tuple(range(0, sizes["layers"], 2 if depth else 1))
    if not width:
        return Cut(checkpoint.architecture, {}, layers)
    torch.manual_seed(0)
    scores = {
        "hidden": torch.rand(sizes["hidden"]),
        "ffn": torch.rand(sizes["layers"], sizes["ffn"]),
        "heads": torch.rand(sizes["layers"], sizes["heads"]),
    }
    targets = {**sizes, "hidden": 1536, "ffn": 2816, "heads": 16}
    return Cut(
        checkpoint.architecture,
        select_units(checkpoint.family, scores, sizes, targets),
        layers,
    )


def prune(source: Path, target: Path, width: bool, depth: bool) -> None:
    """Prunes into an empty folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    write_pruned(open_checkpoint(source), [(target, cut_of(source, width, depth))], SHARD)


def copy(source: Path, target: Path, hashed: bool = False) -> None:
    """``cp -r`` of a finished result; then ``sha256sum`` of the copy's shards."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if hashed:
        shards = sorted(map(str, target.glob("*.safetensors")))
        subprocess.run(["sha256sum", *shards], check=True, stdout=subprocess.DEVNULL)


def peak_megabytes(source: Path, target: Path) -> dict[str, float]:
    """Resident memory of a process of its own that prunes: its peak, and that before it began (its imports)."""
    code = (
        "import sys; from pathlib import Path; import benchmarks.prune as p, torch\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024\n"
        "before = peak(); p.prune(Path(sys.argv[1]), Path(sys.argv[2]), True, True); print(before, peak())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, source, target], capture_output=True, text=True, check=True
    )
    before, peak = map(float, out.stdout.split()[-2:])
    return {"peak_megabytes": round(peak), "of_which_imports": round(before)}


def mergekit(work: Path) -> str | None:
    """The command of mergekit, installed in an environment of its own; None where that fails."""
    home = work / "mergekit"
    command = home / "bin" / "mergekit-yaml"
    if command.is_file():
        return str(command)
    venv.create(home, with_pip=True, clear=True)
    done = subprocess.run([home / "bin" / "pip", "install", "-q", MERGEKIT], check=False)
    return str(command) if done.returncode == 0 else None


def slice_with(command: str, source: Path, target: Path) -> None:
    """Every second layer, as mergekit's passthrough merge has it."""
    shutil.rmtree(target, ignore_errors=True)
    slices = "".join(
        f"  - sources: [{{model: {source}, layer_range: [{i}, {i + 1}]}}]\n"
        for i in range(0, int(str(SHAPE["num_hidden_layers"])), 2)
    )
    recipe = target.with_suffix(".yaml")
    recipe.write_text(f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n")
    options = ["--lazy-unpickle", "--out-shard-size", "500M", "--quiet"]
    done = subprocess.run(
        [command, recipe, target, *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"mergekit failed:\n{done.stderr[-2000:]}")


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        kept = Path(sys.argv[1]) if len(sys.argv) > 1 else work
        source = make_checkpoint(work / "source", SHAPE, "BF16", torch.bfloat16)
        rival = mergekit(kept)
        for kind, width, depth, aim in (
            ("width", True, False, 2.0),
            ("width+depth", True, True, 2.0),
            ("depth", False, True, 1.2),
        ):
            result = work / f"pruned-{kind}"
            prune(source, result, width, depth)
            contestants = {
                "cp of the result": lambda result=result: copy(result, work / "copy"),
                "cp and sha256sum": lambda result=result: copy(result, work / "copy", True),
                "prune": lambda width=width, depth=depth: prune(
                    source, work / "again", width, depth
                ),
                "prune, a process of its own": lambda width=width, depth=depth: in_a_process(
                    source, work / "again", width, depth
                ),
            }
            if kind == "depth" and rival is not None:
                contestants["mergekit's layer slice"] = lambda: slice_with(
                    rival, source, work / "sliced"
                )
            seconds = duel(contestants, 3)
            more = {"result_bytes": sum(path.stat().st_size for path in result.iterdir())}
            if width and depth:
                more |= peak_megabytes(source, work / "measured")
            show(f"prune-{kind}", "cp of the result", seconds, {"prune": aim}, **more)
            shutil.rmtree(result)


def in_a_process(source: Path, target: Path, width: bool, depth: bool) -> None:
    """The same with the start of an interpreter and its imports, as a command line pays them."""
    code = f"import benchmarks.prune as p; from pathlib import Path; p.prune(Path({str(source)!r}), Path({str(target)!r}), {width}, {depth})"
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
