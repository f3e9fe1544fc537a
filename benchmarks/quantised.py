"""Pruning quantised models larger than the memory that is allowed: peak memory, bytes read and time.

Each format is a random checkpoint made on the spot, pruned in a process of its own whose data may
take a part of the checkpoint's size only (``RLIMIT_DATA``). ``python -m benchmarks.quantised [GB]``.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import architecture_of
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.workspace.manifest import write_json

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
ALLOWED = 0.5
"""Memory that pruning may take, as a share of the checkpoint."""


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 120, shape, dtype=torch.uint8)


def _fp8(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if len(shape) < 2 or "_proj" not in name:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) / 448
    return {name: _bytes(*shape).view(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def _mxfp4(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    experts, columns, rows = shape
    blocks = _bytes(experts, rows, columns // 32, 16)
    return {f"{name}_blocks": blocks, f"{name}_scales": _bytes(experts, rows, columns // 32) + 60}


def _safetensors(
    folder: Path, config: dict[str, Any], settings: dict[str, Any],
    made: Callable[[str, tuple[int, ...]], dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    """Writes one shard for each layer."""
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, _, shape in architecture_of(config).tensors():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    index = {}
    for file, shapes in shards.items():
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            tensors |= made(name, shape)
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_json(folder / "config.json", {**config, "quantization_config": settings})


def make_fp8(folder: Path, size: float) -> None:
    """FP8 with a scale for each block of 128 x 128."""
    layers = max(1, round(size / 44.0e6))
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    _safetensors(folder, {**LLAMA, "num_hidden_layers": layers}, settings, _fp8)


def make_mxfp4(folder: Path, size: float) -> None:
    """MXFP4 as gpt-oss is published."""
    layers = max(1, round(size / 224e6))
    _safetensors(
        folder, {**GPT_OSS, "num_hidden_layers": layers}, {"quant_method": "mxfp4"}, _mxfp4
    )


def make_gguf(folder: Path, size: float) -> None:
    """GGUF in blocks of Q8_0, one per 32 numbers."""
    import gguf

    from nemo_minitron.checkpoints.gguf_weights import gguf_name
    from nemo_minitron.models.gguf_folder import write_gguf_folder

    layers = max(1, round(size / 48e6))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in {
        "context_length": 2048, "block_count": layers, "embedding_length": 2048, "feed_forward_length": 5632,
        "attention.head_count": 32, "attention.head_count_kv": 8,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    held: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}  # one of each shape lies in memory
    for name, _, shape in architecture_of({**LLAMA, "num_hidden_layers": layers}).tensors():
        if shape not in held:
            blocks = np.random.default_rng(0).integers(
                0, 120, (shape[0], shape[-1] // 32, 34), np.uint8
            )
            blocks[..., :2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
            held[shape] = blocks.reshape(shape[0], -1)
            if len(shape) == 1:
                held[shape] = np.ones(shape, np.float32)
        kind = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else "Q8_0"]
        writer.add_tensor(gguf_name("llama", layers, name), held[shape], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_gguf_folder(folder / "model.gguf", folder)


FORMATS = {"fp8": make_fp8, "mxfp4": make_mxfp4, "gguf": make_gguf}


def prune(source: Path, target: Path, allowed: int) -> None:
    """Prunes under a limit, and prints what it took: bytes of memory beyond the imports, bytes read, seconds."""
    checkpoint = open_checkpoint(source)
    sizes = checkpoint.architecture.sizes
    hidden = torch.arange(0, sizes["hidden"] // 4 * 3)
    axis = "expert_ffn" if "expert_ffn" in sizes else "ffn"
    owners = (sizes["layers"], *((sizes["experts"],) if axis == "expert_ffn" else ()))
    kept = torch.arange(sizes[axis] // 2).expand(*owners, -1)
    cut = Cut(
        checkpoint.architecture, {"hidden": hidden, axis: kept}, tuple(range(sizes["layers"]))
    )
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + allowed,) * 2)
    read, started = _read(), time.monotonic()
    write_pruned(checkpoint, [(target, cut)], 500_000_000)
    took = time.monotonic() - started
    print(json.dumps([_status("VmHWM") - before, _read() - read, took]))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def main(size: float) -> None:
    """Measures all formats."""
    for name, make in FORMATS.items():
        with tempfile.TemporaryDirectory() as work:
            source, target = Path(work) / "source", Path(work) / "target"
            source.mkdir()
            target.mkdir()
            make(source, size)
            files = [*source.glob("*.safetensors"), *source.glob("*.gguf")]
            held = sum(file.stat().st_size for file in files)
            command = [
                sys.executable,
                "-m",
                "benchmarks.quantised",
                str(source),
                str(target),
                str(int(held * ALLOWED)),
            ]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
            )
            peak, read, took = json.loads(done.stdout.splitlines()[-1])
            out = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            print(
                f"{name}: {held / 1e9:.2f} GB, {out / 1e9:.2f} GB pruned in bfloat16; peak {peak / 1e6:,.0f} MB "
                f"({peak / held:.3f} of the checkpoint), read {read / 1e9:.2f} GB ({read / held:.2f}), {took:.0f} s",
                flush=True,
            )
            shutil.rmtree(target)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        prune(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(float(sys.argv[1]) * 1e9 if len(sys.argv) > 1 else 2.5e9)
