"""Short trainings of one pruned model by several engines, and by the teacher's kinds, beside a plain one."""

import importlib.util
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.clock import Row, device_of
from nemo_minitron.workspace.training_log import read_log

PLAIN, SAME = "plain", ("FSDP2 on one rank", "teacher in the machine's memory")
"""The engines whose losses must be those of the plain training."""
_APART = 1e-3


def rows(tiny: bool) -> list[Row]:
    """A row for each engine: milliseconds a step (median of the later half), and the last loss.

    Raises:
        AssertionError: an engine that must not change the losses does.
    """
    logs = trainings(device_of(tiny), tiny)
    found = []
    for name, lines in logs.items():
        apart = _apart(logs[PLAIN], lines)
        assert name not in SAME or apart < _APART, f"{name}: departs from plain by {apart:.1e}"
        milliseconds = _milliseconds(lines)
        note = f"last loss {lines[-1]['loss']:.5f}, at most {apart:.1e} from the plain one's losses"
        found.append(Row(name, milliseconds, milliseconds / _milliseconds(logs[PLAIN]), None, note))
    return found


def trainings(device: str, tiny: bool) -> dict[str, list[Any]]:
    """Logs of short trainings of one pruned model, by engine."""
    from nemo_minitron.config.compose import load_config
    from nemo_minitron.stages.run import run_stage

    found = {}
    with tempfile.TemporaryDirectory() as place:
        config = load_config(
            "demo", [f"workspace={place}/teacher", "pretrain.trainer.max_steps=20"]
        )
        run_stage("pretrain", config)
        for number, (name, words) in enumerate(_engines(device).items()):
            workspace = f"{place}/{number}"
            config = load_config(
                "demo",
                [
                    f"workspace={workspace}", f"source.model={place}/teacher/pretrain/hf", "pretrain.enabled=false",
                    f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}",
                    f"trainer.max_steps={3 if tiny else 30}", "trainer.log_every_n_steps=1",
                    "trainer.enable_progress_bar=false", "score.importance=magnitude", *words,
                ],
            )  # fmt: skip
            for stage in ("download", "score", "plan", "prune", "distill"):
                run_stage(stage, config)
            lines = read_log(Path(workspace) / "student" / "metrics.jsonl")
            found[name] = [line for line in lines if "loss" in line]
            print(f"  {name:<32} last loss {found[name][-1]['loss']:.5f}", flush=True)
    return found


def _engines(device: str) -> dict[str, list[str]]:
    """Names of engines to what is said for them on the command line."""
    mixed = ["trainer.precision=bf16-mixed"]
    found = {
        PLAIN: [],
        "bf16-mixed": mixed,
        "FSDP2 on one rank": ["training.parallel=shard"],
        "compiled": ["training.compile=true"],
        "teacher in the machine's memory": ["distill.teacher_place=offload"],
        "teacher in int8": ["distill.teacher_dtype=int8"],
        "teacher in fp8": ["distill.teacher_dtype=fp8"],
    }
    if importlib.util.find_spec("transformer_engine") and device == "cuda":
        found["Transformer Engine"] = [*mixed, "training.transformer_engine=on"]
        found["Transformer Engine, FP8"] = [*mixed, "training.transformer_engine=fp8"]
    return found


def _apart(plain: list[Any], lines: list[Any]) -> float:
    pairs = zip(plain, lines, strict=True)
    return max(abs(one["loss"] - other["loss"]) / one["loss"] for one, other in pairs)


def _milliseconds(lines: list[Any]) -> float:
    """Milliseconds of a step."""
    later = lines[len(lines) // 2 :]
    return median(
        1000 * line["tokens"] / line["step"] / line["tokens_per_second"] for line in later
    )
