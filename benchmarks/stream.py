"""Scoring layer by layer under a memory limit of a quarter of the model, against accelerate's disk offload.

Each contestant is a process of its own, with RLIMIT_DATA at a quarter of the checkpoint beyond what its imports take.
Memory is its peak of anonymous pages, bytes are what it read (rchar, or read through a map: read_bytes of a cold cache is
not to be had without privileges).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.duel import show
from benchmarks.prune import make_checkpoint
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.scoring.pass_by_layer import layer_bytes

SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "dtype": "float32", "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip
SAMPLES, LENGTH, BATCH = 16, 128, 4
BUDGET = 8_000_000
"""Bytes of hidden states in memory; all of them are twice as much."""

_COMMON = """
import json, os, resource, sys, time, torch
from pathlib import Path
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.calibration_samples import Samples
folder, work = map(Path, sys.argv[1:3])
limit, count, length, batch, budget = map(int, sys.argv[3:])
samples = Samples(torch.randint(0, 8192, (count, length + 1), generator=torch.Generator().manual_seed(0)))
groups = [list(range(i, i + batch)) for i in range(0, count, batch)]
def field(name): return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024
def read(): return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
def begin():
    global imports, before, started
    imports, before = field("VmData:"), read()
    if limit: resource.setrlimit(resource.RLIMIT_DATA, (imports + limit,) * 2)
    Path("/proc/self/clear_refs").write_text("5")
    imports = field("VmRSS:")
    started = time.perf_counter()
def end(values):
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": field("VmHWM:") - imports,
                      "read": read() - before, "values": values}))
"""
_OURS = """
from nemo_minitron.scoring.pass_by_layer import streamed
from nemo_minitron.scoring.hooks import Measures
begin()
calibration = streamed(open_checkpoint(folder), samples, groups, Measures(), torch.device("cpu"), budget, work)
sums = calibration.depth["block_influence", 1]
end((1 - sums.total / sums.count).tolist())
"""
_ACCELERATE = """
import accelerate, transformers
from nemo_minitron.scoring.pass_in_memory import in_memory
from nemo_minitron.scoring.hooks import Measures
begin()
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
with accelerate.init_empty_weights():
    model = transformers.AutoModelForCausalLM.from_config(config)
places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
places |= {f"model.layers.{i}": "disk" for i in range(config.num_hidden_layers)}
model = accelerate.load_checkpoint_and_dispatch(model, str(folder), device_map=places, offload_folder=str(work / "offload"))
with torch.inference_mode():
    for group in groups:
        model.model(input_ids=samples.tokens_NS[group, :-1], use_cache=False)
end([])
"""


def run(code: str, *arguments: object) -> dict[str, float] | str:
    """What a process of its own measured, or the last line of its complaint."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _COMMON + code,
            *map(str, (*arguments, SAMPLES, LENGTH, BATCH, BUDGET)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name) / "model", SHAPE, "F32", torch.float32)
        checkpoint = open_checkpoint(folder)
        size = sum(entry.size for entry in checkpoint.entries.values())
        outside, layer = layer_bytes(checkpoint)
        limit = size // 4
        (Path(name) / "work").mkdir()
        found = {
            "accelerate's disk offload": run(_ACCELERATE, folder, Path(name) / "work", 0),
            "layer by layer": run(_OURS, folder, Path(name) / "work", 0),
            "layer by layer, limited": run(_OURS, folder, Path(name) / "work", limit),
        }
        limited = run(_ACCELERATE, folder, Path(name) / "work", limit)
        measured = {key: value for key, value in found.items() if isinstance(value, dict)}
        for key, value in found.items():
            if isinstance(value, str):
                raise SystemExit(f"{key}: {value}")
        more = {
            key: f"peak {value['peak'] / 1e6:.0f} MB, read {value['read'] / size:.2f} x the checkpoint"
            for key, value in measured.items()
        }
        show(
            "score-stream", "accelerate's disk offload", {key: value["seconds"] for key, value in measured.items()}, {},
            checkpoint_megabytes=round(size / 1e6), limit_megabytes=round(limit / 1e6),
            embedding_head_and_one_layer_megabytes=round((outside + layer) / 1e6), budget_megabytes=BUDGET // 10**6,
            accelerate_under_the_same_limit=limited if isinstance(limited, str) else f"{limited['seconds']:.1f} s", **more,
        )  # fmt: skip


if __name__ == "__main__":
    main()
