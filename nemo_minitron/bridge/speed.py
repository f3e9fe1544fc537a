"""Speed and memory of one model, measured in a process of its own (``python -m nemo_minitron.bridge.speed``).

Prints one JSON object. Peak memory is the most that the process held beyond what the libraries take: weights,
activations, KV cache; on a GPU, the most that torch allocated there.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPEATS = 3


def measure_in_process(
    folder: Path, device: str, prompt_tokens: int, new_tokens: int
) -> dict[str, float | None]:
    """Measures a model in a fresh process.

    Returns:
        ``prefill_tokens_per_second``, ``decode_tokens_per_second`` (batch 1, best of three),
        ``peak_megabytes``.

    Raises:
        RuntimeError: the process failed; its last words are the message.
    """
    command = [
        sys.executable,
        "-m",
        "nemo_minitron.bridge.speed",
        str(folder),
        device,
        str(prompt_tokens),
        str(new_tokens),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"speed of {folder}: {last}")
    numbers: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def _measure(folder: Path, device_name: str, prompt_tokens: int, new_tokens: int) -> dict[str, float | None]:
    import torch

    from nemo_minitron.bridge.models import frozen, load_model, pick_device

    device = pick_device(device_name)
    _warm_up(folder)
    before = _start_counting()
    model = load_model(folder, device=device)
    torch.manual_seed(0)
    room = getattr(model.config, "max_position_embeddings", prompt_tokens + new_tokens)
    prompt_tokens = max(1, min(prompt_tokens, room - new_tokens))
    prompt_1S = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), device=device)
    with frozen(model):
        runs = [_once(model, prompt_1S, new_tokens) for _ in range(REPEATS)]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = None if before is None else _status_megabytes("VmHWM") - before
    return {
        "prefill_tokens_per_second": round(prompt_tokens / min(run[0] for run in runs), 1),
        "decode_tokens_per_second": round(new_tokens / min(run[1] for run in runs), 1),
        "peak_megabytes": None if peak is None else round(peak, 1),
    }


def _once(model: Any, prompt_1S: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill, and of greedy decoding with the cache."""
    import torch

    start = _clock(prompt_1S)
    out = model(prompt_1S, use_cache=True, logits_to_keep=1)
    filled = _clock(prompt_1S)
    token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    for _ in range(new_tokens):
        out = model(token, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    assert torch.isfinite(out.logits).all()
    return filled - start, _clock(prompt_1S) - filled


def _clock(on: Any) -> float:
    import torch

    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


def _warm_up(folder: Path) -> None:
    """Imports the model's class and starts torch's threads, so that neither counts as the model's memory."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(config)
    torch.ones(512, 512) @ torch.ones(512, 512)


def _start_counting() -> float | None:
    """Sets the process' peak back to what it holds now (Linux, proc(5), clear_refs); returns that.

    ``getrusage`` cannot serve: its peak survives exec, so that a child starts with its parent's.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system: memory is not measured
        return None
    return _status_megabytes("VmRSS")


def _status_megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
