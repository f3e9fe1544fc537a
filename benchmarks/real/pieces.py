"""The pieces of ``make real``, each by the commands of the README; a piece that is done is read, not made again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real import answers
from benchmarks.real.packages import GEMMA, SMOLLM2, Published, fetched
from benchmarks.real.texts import KINDS
from benchmarks.real.tools import Run, result_of
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.cut_losses import PICTURE, price, read_sensitivity
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.evaluation.screening import read_screen
from nemo_minitron.release.quickstart import QUICKSTART
from nemo_minitron.stages.inputs import source_folder
from nemo_minitron.workspace.layout import Workspace, model_in, plots_in

_CHOICE, _BYTES = "held_out_choice", "held_out_bytes"
_MODELS = ("teacher", "pruned", "student")


@dataclass(frozen=True)
class Cut:
    """A model, and how it is made smaller.

    Attributes:
        model: which.
        plan: overrides.
        gguf: whether it is written as GGUF too.
    """

    model: Published
    plan: tuple[str, ...]
    gguf: bool = False


CUTS = {
    "smollm2-100m": Cut(SMOLLM2, ("plan.ffn=1024", "plan.layers=26")),
    "smollm2-70m": Cut(SMOLLM2, ("plan.ffn=768", "plan.layers=19")),
    "gemma": Cut(GEMMA, ("plan.ffn=1536", "plan.layers=15"), gguf=True),
}
VOCABULARIES = {
    "smollm2-vocab": Cut(SMOLLM2, ("plan.vocab=16384",)),
    "gemma-vocab": Cut(GEMMA, ("plan.vocab=87381",)),
}
"""A third of the entries."""
_COUNTED = ("data.calibration.sequence_length=1024", "data.calibration.samples=1024")
"""What entries are counted on; nothing is computed, so that it can be much."""


def smaller(run: Run, piece: str) -> dict[str, Any]:
    """Width and depth: size, score, plan, prune, distil, evaluate, export, and what the export writes."""
    cut = CUTS[piece]
    model = fetched(cut.model, run.root / "models")
    sizes = [word.partition("plan.")[2] for word in cut.plan]
    run.minitron(piece, "size", str(model), *sizes)
    common = [*run.data(model, piece, "prose"), *cut.plan]
    run.stages(piece, "score plan prune", *common)
    run.stages(piece, "distill", *common, *run.training(piece, run.profile.lr))
    tasks = [
        f"evaluate.tasks=[{_CHOICE},{_BYTES}]", f"evaluate.task_limit={run.profile.task_limit}",
        "evaluate.speed=false", "evaluate.prompts=0",
    ]  # fmt: skip
    run.stages(piece, "evaluate", *common, *tasks)
    out = ["export.gguf=[bf16,q8_0]"] if cut.gguf else []
    run.stages(piece, "export", *common, *tasks, *out)
    workspace = Workspace(run.workspace(piece))
    models = read_report(workspace.report)["models"]
    return {
        "model": cut.model.title, "plan": sizes, **run.trained_on(piece),
        "models": {name: _measured(models[name]) for name in _MODELS},
        "answers": answers.answers(_folders(run, piece, common), "auto"),
        "quickstart": _quickstart(run, workspace.export),
        "files": {path.name: path.stat().st_size for path in _weights(workspace.export)},
    }  # fmt: skip


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    choice, read = row["tasks"][_CHOICE], row["tasks"][_BYTES]
    return {
        "parameters": row["parameters"], "loss": row["loss"], "perplexity": row["perplexity"],
        "bits_per_byte": read["bits_per_byte"], "choice": choice["acc"], "choice_stderr": choice["acc_stderr"],
    }  # fmt: skip


def _weights(export: Path) -> list[Path]:
    return sorted(path for path in export.iterdir() if path.suffix in (".safetensors", ".gguf"))


def _folders(run: Run, piece: str, common: list[str]) -> dict[str, Path]:
    """Model of a workspace to its folder."""
    workspace = Workspace(run.workspace(piece))
    source, _ = source_folder(load_config("config", [*common, *run.extra]))
    return {"teacher": source, "pruned": workspace.pruned, "student": model_in(workspace.student)}


def _quickstart(run: Run, export: Path) -> str:
    """What the README's own lines write with an export, in a process that knows transformers alone."""
    done = subprocess.run(
        [sys.executable, "-c", QUICKSTART], cwd=export, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def vocabulary(run: Run, piece: str, cut: Cut | None = None) -> dict[str, Any]:
    """A third of the vocabulary: three kinds of text, before and after distillation, sizes and speed."""
    cut = cut or VOCABULARIES[piece]
    model = fetched(cut.model, run.root / "models")
    common = [*run.data(model, piece, "prose", "code"), *_COUNTED, *cut.plan]
    run.stages(piece, "plan prune", *common)
    # the divergence begins at 0 (the teacher reads the same pieces), so that the data must teach
    taught = [*run.training(piece, run.profile.vocabulary_lr), "distill.ce=1"]
    run.stages(piece, "distill", *common, *taught)
    workspace, texts, kept = Workspace(run.workspace(piece)), {}, {}
    quiet = ["evaluate.speed=false", "evaluate.prompts=0"]
    for kind in KINDS:
        if not Path(run.text(kind, "validation")).exists():
            print(f"{piece}: no text in {kind} on this machine; left out", flush=True)
            continue
        run.stages(piece, "evaluate", *common, *run.held_out(kind), *quiet)
        report = read_report(workspace.report)
        kept = report["vocabulary"]
        texts[kind] = {
            name: {key: report["models"][name][key] for key in ("bits_per_byte", "tokens_per_byte")}
            for name in _MODELS
        } | {"covered": kept["held_out"]}
    folders = _folders(run, piece, common)
    parameters = {name: report["models"][name]["parameters"] for name in _MODELS}
    sample = json.loads(Path(run.text("prose", "validation")).read_text().splitlines()[0])["text"]
    speed = answers.decode_speed(
        {name: folders[name] for name in ("teacher", "student")}, sample[:4000], "auto"
    )
    return {
        "model": cut.model.title, **run.trained_on(piece), "entries": [kept["of"], kept["kept"]],
        "parameters": parameters, "bfloat16_bytes": {name: 2 * count for name, count in parameters.items()},
        "texts": texts, "decode": speed,
    }  # fmt: skip


def sensitivity(run: Run, piece: str) -> dict[str, Any]:
    """What is cheap to cut: each axis alone at several sizes, and each layer."""
    common = [
        *run.data(fetched(SMOLLM2, run.root / "models"), "smollm2-100m", "prose"),
        f"plan.budget.screen_samples={run.profile.screen_samples}",
    ]
    run.stages(piece, "score sensitivity", *common)
    folder = Workspace(run.workspace("smollm2-100m")).sensitivity
    cuts = read_sensitivity(folder)
    shutil.copyfile(plots_in(folder) / PICTURE, result_of(run.profile, piece).with_suffix(".png"))
    return {
        "model": SMOLLM2.title, "loss": cuts.loss,
        "cuts": [
            {"axis": cut.axis, "size": cut.size, "share": cut.share, "saved": cut.parameters,
             "loss": cut.loss, "price": price(cuts, cut)}
            for cut in sorted(cuts.axes, key=lambda cut: price(cuts, cut))
        ],
        "layers": cuts.layers, "left_out": cuts.left_out,
    }  # fmt: skip


def screen(run: Run, piece: str) -> dict[str, Any]:
    """Sizes of 70 % of the parameters, measured as they are cut."""
    common = [
        *run.data(fetched(SMOLLM2, run.root / "models"), "smollm2-100m", "prose"),
        f"plan.budget.screen_samples={run.profile.screen_samples}",
        "plan.budget.params=94e6", "plan.budget.tolerance=0.03", f"plan.budget.screened={run.profile.screened}",
        f"plan.budget.tasks=[{_CHOICE}]", f"plan.budget.task_limit={run.profile.task_limit // 2}",
    ]  # fmt: skip
    run.stages(piece, "score screen", *common)
    found = read_screen(Workspace(run.workspace("smollm2-100m")).screen)
    return {
        "model": SMOLLM2.title, "possible": found.sizes_possible, "within": found.sizes_within,
        "screened": [
            {"sizes": one.sizes, "parameters": one.costs["parameters"], "loss": one.loss,
             "choice": one.tasks[_CHOICE]["acc"]}
            for one in found.candidates
        ],
    }  # fmt: skip


PIECES: dict[str, tuple[Callable[[Run, str], dict[str, Any]], str]] = {
    "smollm2-vocab": (vocabulary, "SmolLM2-135M with a third of its vocabulary"),
    "gemma": (smaller, "Gemma 3 270M, width and depth"),
    "gemma-vocab": (vocabulary, "Gemma 3 270M with a third of its vocabulary"),
    "sensitivity": (sensitivity, "SmolLM2-135M: what is cheap to cut"),
    "screen": (screen, "SmolLM2-135M: sizes of 70 % of its parameters, measured as they are cut"),
    "smollm2-100m": (smaller, "SmolLM2-135M to about 100 million parameters"),
    "smollm2-70m": (smaller, "SmolLM2-135M to about 70 million parameters"),
}
