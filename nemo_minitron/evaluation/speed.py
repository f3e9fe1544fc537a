"""Speed and memory of one model, measured in a process of its own.

The process runs ``python -m nemo_minitron.evaluation.speed``.

Prints one JSON object. Peak memory is the most that the process held beyond what the libraries
take: weights, activations, KV cache; on a GPU, the most that torch allocated there.
"""

import contextlib
import gc
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_minitron.evaluation.vllm_device import misplaced

REPEATS = 3
_MEASURED = "measured: "
"""What the line begins with on which a process tells its numbers."""


@dataclass(frozen=True)
class Case:
    """One timed case: batch, prompt length and new tokens.

    Attributes:
        batch: samples at a time.
        prompt: tokens of each prompt.
        new: tokens generated behind it.
    """

    batch: int
    prompt: int
    new: int


def conditions(device_name: str) -> dict[str, str | None]:
    """Conditions of a speed measurement besides model and cases: machine, software."""
    import torch

    from nemo_minitron.models.causal_lm import pick_device

    device = pick_device(device_name)
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{_processor()}, {torch.get_num_threads()} threads"
    served = None
    if importlib.util.find_spec("vllm") is not None:
        with contextlib.suppress(PackageNotFoundError):
            served = version("vllm")
    return {"machine": machine, "torch": torch.__version__, "vllm": served}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure_in_process(
    folder: Path, device: str, cases: Sequence[Case], dtype: str = "auto"
) -> dict[str, Any]:
    """Measures a model in a fresh process, and under vLLM in another where that is installed.

    Args:
        folder: the model's.
        device: as in ``evaluate.device``.
        cases: what is timed.
        dtype: what the weights are loaded as; ``auto``: as they are stored.

    Returns:
        ``cases``: for each ``batch``, ``prompt``, ``new``, ``first_token_ms`` (the prompts' pass,
        best of three), ``prefill_tokens_per_second``, ``decode_tokens_per_second`` (over the batch,
        best of three); ``peak_megabytes``; with vLLM ``vllm``: cases with ``tokens_per_second``, or
        ``failed``: its last words.

    Raises:
        RuntimeError: the process failed; its last words are the message.
    """
    found = _in_process("transformers", folder, device, cases, dtype)
    if isinstance(found, str):
        raise RuntimeError(f"speed of {folder}: {found}")
    if importlib.util.find_spec("vllm") is not None:
        served = _elsewhere(device) or _in_process("vllm", folder, device, cases, dtype)
        found["vllm"] = {"failed": served} if isinstance(served, str) else served
    return found


def _elsewhere(device: str) -> str | None:
    """Why vLLM's speed would be that of another device."""
    import torch

    try:
        return misplaced(device, torch.cuda.is_available(), version("vllm"))
    except PackageNotFoundError:  # under another name, which tells nothing of its build
        return misplaced(device, False, "")


def _in_process(engine: str, folder: Path, device: str, cases: Sequence[Case], dtype: str) -> Any:
    """The numbers that a process prints; if it fails, its last line of output."""
    command = [sys.executable, "-m", "nemo_minitron.evaluation.speed", engine, str(folder), device]
    command += [json.dumps([asdict(case) for case in cases]), dtype]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        # pydantic's last line is an address of its documentation
        said = [
            line.strip() for line in done.stderr.splitlines() if "errors.pydantic.dev" not in line
        ]
        return next((line for line in reversed(said) if line), f"exit code {done.returncode}")
    # vLLM writes its log to the same place, up to its end
    (measured,) = (line for line in done.stdout.splitlines() if line.startswith(_MEASURED))
    return json.loads(measured.removeprefix(_MEASURED))


def _measure(
    folder: Path, device_name: str, cases: Sequence[Case], dtype: str = "auto"
) -> dict[str, Any]:
    import torch

    from nemo_minitron.models.causal_lm import frozen, load_model, pick_device

    device = pick_device(device_name)
    _warm_up(folder)
    before = _start_counting()
    model = load_model(folder, dtype, device)
    # what loading takes for a while (a file's float32 on its way to bfloat16) is no part of it
    gc.collect()
    _forget_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    with frozen(model):
        found = [_timed(model, case, device) for case in cases]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = None if before is None else _status_megabytes("VmHWM") - before
    return {"cases": found, "peak_megabytes": None if peak is None else round(peak, 1)}


def _timed(model: Any, case: Case, device: Any) -> dict[str, Any]:
    import torch

    case = _fitting(case, model.config)
    prompt = case.prompt
    prompt_BS = torch.randint(0, model.config.vocab_size, (case.batch, prompt), device=device)
    runs = [_once(model, prompt_BS, case.new) for _ in range(REPEATS)]
    first, rest = min(run[0] for run in runs), min(run[1] for run in runs)
    return {
        "batch": case.batch, "prompt": prompt, "new": case.new, "first_token_ms": round(1000 * first, 2),
        "prefill_tokens_per_second": round(case.batch * prompt / first, 1),
        "decode_tokens_per_second": round(case.batch * case.new / rest, 1),
    }  # fmt: skip


def _fitting(case: Case, config: Any) -> Case:
    """A case whose prompt and answer have room in the model's positions."""
    room = getattr(config.get_text_config(), "max_position_embeddings", case.prompt + case.new)
    new = max(1, min(case.new, room - 1))
    return replace(case, prompt=max(1, min(case.prompt, room - new)), new=new)


def _measure_vllm(folder: Path, cases: Sequence[Case], dtype: str) -> dict[str, Any]:
    """The same prompts under vLLM: generated tokens a second over the batch, the prompts' pass included."""
    import random

    import vllm
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cases = [_fitting(case, config) for case in cases]
    longest = max(case.prompt + case.new for case in cases)
    engine = vllm.LLM(
        model=str(folder), dtype=dtype, skip_tokenizer_init=True, max_model_len=longest
    )
    vocabulary, draw = engine.llm_engine.model_config.get_vocab_size(), random.Random(0)
    found = []
    for case in cases:
        prompts = [
            {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(case.prompt)]}
            for _ in range(case.batch)
        ]
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=case.new,
            min_tokens=case.new,
            ignore_eos=True,
            detokenize=False,
        )
        best = float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False)
            best = min(best, time.perf_counter() - start)
        found.append({**asdict(case), "tokens_per_second": round(case.batch * case.new / best, 1)})
    return {"cases": found, "version": vllm.__version__}


def _once(model: Any, prompt_BS: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill, and of greedy decoding with the cache."""
    import torch

    start = _clock(prompt_BS)
    out = model(prompt_BS, use_cache=True, logits_to_keep=1)
    filled = _clock(prompt_BS)
    token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    for _ in range(new_tokens):
        out = model(token, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    assert torch.isfinite(out.logits).all()
    return filled - start, _clock(prompt_BS) - filled


def _clock(on: Any) -> float:
    import torch

    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


def _warm_up(folder: Path) -> None:
    """Imports the model's class and starts torch's threads, so that neither counts as the model's memory."""
    import torch
    import transformers

    from nemo_minitron.checkpoints.hf_config import both_spellings, read_config
    from nemo_minitron.models.config_trial import config_object

    config = config_object(both_spellings(read_config(folder)))
    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    torch.ones(512, 512) @ torch.ones(512, 512)


def _start_counting() -> float | None:
    """Sets the process' peak back to what it holds now; returns that, None where it cannot be measured.

    ``getrusage`` cannot serve: its peak survives exec, so that a child starts with its parent's. Nor
    can psutil: it does not know the peak, and what is held now is read where the peak is, to be
    comparable.
    """
    return _status_megabytes("VmRSS") if _forget_peak() else None


def _forget_peak() -> bool:
    """Sets the process' peak back (Linux, proc(5), clear_refs); False: on another system."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(engine: str, folder: str, device: str, cases: str, dtype: str) -> None:
    """Measures and prints."""
    asked, place = [Case(**case) for case in json.loads(cases)], Path(folder)
    served = engine == "vllm"
    numbers = (
        _measure_vllm(place, asked, dtype) if served else _measure(place, device, asked, dtype)
    )
    print(f"\n{_MEASURED}{json.dumps(numbers)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
