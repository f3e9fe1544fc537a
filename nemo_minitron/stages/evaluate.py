"""evaluate: teacher, pruned, student and baseline side by side; the report; and the gate before export."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.build import make
from nemo_minitron.artifacts.checkpoint import open_checkpoint
from nemo_minitron.artifacts.manifest import Input, digest, hash_file, read_manifest, write_json
from nemo_minitron.artifacts.report import FILE, check_gate, columns, read_report, table
from nemo_minitron.artifacts.workspace import input_artifact
from nemo_minitron.core.size import model_size
from nemo_minitron.stages.config import Config
from nemo_minitron.stages.report import write_page
from nemo_minitron.stages.stage import (
    VALIDATION_SAMPLES,
    Result,
    sampling,
    teacher_folder,
    text_input,
    validation_samples,
    validation_text,
    workspace_of,
)


def run(config: Config) -> Result:
    """Measures every model of the workspace on the held-out text and on lm-eval tasks, and writes the report.

    Raises:
        ValueError: an unknown task, or no held-out text.
        GateError: the student keeps less of the teacher's quality than ``evaluate.min_retention``; the
            report is there.
    """
    workspace = workspace_of(config)
    models, inputs = _models(config)
    texts = validation_text(config)
    inputs.append(text_input(texts))
    if config.evaluate.task_dir is not None:
        own = sorted(path for path in Path(config.evaluate.task_dir).rglob("*") if path.is_file())
        inputs.append(Input(config.evaluate.task_dir, digest([[p.name, hash_file(p)] for p in own])))
    settings = {**asdict(config.evaluate), "validation": sampling(config.data.validation, VALIDATION_SAMPLES)}
    del settings["min_retention"], settings["from_scratch"]
    folder = workspace / "report"

    def build(temporary: Path) -> None:
        """Measures all models and writes the report."""
        if any(name.startswith("held_out") for name in config.evaluate.tasks):
            from nemo_minitron.bridge.lm_eval import write_held_out_tasks
            from nemo_minitron.bridge.text import documents, plain

            (temporary / "tasks").mkdir()
            write_held_out_tasks(plain(documents(texts)), temporary / "tasks")
        measured = _measure_all(config, models, temporary / "tasks")
        write_json(temporary / FILE, {"workspace": workspace.name, "models": measured})
        write_page(workspace, temporary)

    made = make(folder, "report", settings, inputs, build)
    report = read_report(folder)
    check_gate(report, config.evaluate.min_retention)
    student = report["models"]["student"]
    headline = f"the student keeps {student['retention']:.1%} of the teacher's quality (perplexity ratio)"
    return Result("evaluate", folder, made, headline, columns(report), table(report), report["models"])


def _models(config: Config) -> tuple[dict[str, Path], list[Input]]:
    workspace = workspace_of(config)
    teacher, item = teacher_folder(config)
    models, inputs = {"teacher": teacher}, [item]
    for name, artifact, stage, part in (
        ("pruned", "pruned", "prune", ""),
        ("student", "student", "distill", "hf"),
        ("scratch", "scratch", "pretrain", "hf"),
    ):
        if name == "scratch" and not (config.evaluate.from_scratch and read_manifest(workspace / artifact)):
            continue
        models[name] = workspace / artifact / part
        inputs.append(input_artifact(workspace, artifact, stage))
    return models, inputs


def _measure_all(config: Config, models: Mapping[str, Path], tasks: Path) -> dict[str, Any]:
    from rich.progress import track

    from nemo_minitron.bridge.models import load_tokenizer

    tokenizer = load_tokenizer(models["teacher"])
    tokens_NS = validation_samples(config, tokenizer)
    measured: dict[str, Any] = {}
    for name in track(list(models), description="evaluating", transient=True):
        measured[name] = _measure(config, models[name], tokenizer, tokens_NS, tasks)
        loss = measured[name]["loss"]
        measured[name]["retention"] = math.exp(measured["teacher"]["loss"] - loss)
    return measured


def _measure(config: Config, folder: Path, tokenizer: Any, tokens_NS: Any, tasks: Path) -> dict[str, Any]:
    from nemo_minitron.bridge.models import frozen, load_model, pick_device
    from nemo_minitron.bridge.perplexity import held_out_loss
    from nemo_minitron.bridge.speed import measure_in_process

    settings = config.evaluate
    checkpoint = open_checkpoint(folder)
    size = model_size(checkpoint.family, checkpoint.config)
    model = load_model(folder, device=pick_device(settings.device))
    with frozen(model):
        loss = held_out_loss(model, checkpoint.family, tokens_NS, settings.batch_size)
    row: dict[str, Any] = {
        "parameters": size.parameters,
        "non_embedding": size.non_embedding,
        "flops_per_token": size.flops_per_token,
        "kv_bytes_per_token": size.kv_bytes_per_token,
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": tokens_NS.shape[0] * (tokens_NS.shape[1] - 1),
    }
    if settings.tasks:
        from nemo_minitron.bridge.lm_eval import run_tasks

        row["tasks"] = run_tasks(
            model,
            tokenizer,
            list(settings.tasks),
            settings.task_dir,
            tasks,
            settings.task_limit,
            settings.batch_size,
        )
    del model
    if settings.speed:
        row["speed"] = measure_in_process(
            folder, settings.device, settings.prompt_tokens, settings.new_tokens
        )
    return row
