"""evaluate: teacher, pruned, student and baseline side by side; the report; and the gate before export."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import main_dtype, open_checkpoint
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.config.evaluate_config import EvaluateConfig
from nemo_minitron.data.mixtures import (
    VALIDATION_SAMPLES,
    held_out_sampling,
    text_input,
    validation_text,
)
from nemo_minitron.evaluation.answers import answers_of, check_chat, settings_without_defaults
from nemo_minitron.evaluation.gate import JUDGES, Gate, gate_of, judge, raise_if_failed
from nemo_minitron.evaluation.measurements import SPEED, TEXT, WRITING, Bench, Unit, work
from nemo_minitron.evaluation.own_tokens import (
    bits_of_samples,
    bits_per_byte,
    loss_by_teacher_token,
)
from nemo_minitron.evaluation.report import (
    FILE,
    NAMES,
    columns,
    is_beside,
    read_report,
    table,
    vocabulary_notes,
)
from nemo_minitron.evaluation.report_page import write_page
from nemo_minitron.evaluation.significance import paired, recovered
from nemo_minitron.families import VOCAB
from nemo_minitron.losses.kept_entries import KeptEntries
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.inputs import (
    POSITIONS,
    length_notes,
    model_folder,
    teacher_folder,
)
from nemo_minitron.stages.origin import is_corrected, uncorrected
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.stages.vocabularies import entries_of_all
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace, model_in
from nemo_minitron.workspace.manifest import Input, digest, read_manifest, write_json
from nemo_minitron.workspace.results import Results

_SHOWN = 6


def recipe(config: Config) -> Recipe:
    """Measures every model of the workspace on the held-out text and on lm-eval tasks, and writes the report.

    Under torchrun the ranks share the measurements.

    Raises:
        ValueError: an unknown task, no held-out text, or a gate for what is not measured.
        RuntimeError: when built: a task failed; what else was measured is kept.
        GateError: when summarised: the student does not meet the gate's bounds; the report is kept.
    """
    workspace, gate = Workspace(workspace_of(config)), gate_of(config)
    _check(config)
    bench, inputs = _bench(config)
    folder = workspace.report
    held_out = held_out_sampling(config, VALIDATION_SAMPLES)
    asked = settings_without_defaults(asdict(config.evaluate), answers_of(config.evaluate))
    settings = {**asked, "validation": held_out, "dtypes": dict(bench.dtypes)}
    for name in (*JUDGES, "from_scratch", "batch_size", "model"):
        del settings[name]

    def build(_state: Path, temporary: Path, ranks: Ranks) -> None:
        """Measures all models and writes the report."""
        ranks.first(lambda: _write_tasks(config, bench))
        failed = work(bench, ranks)
        if ranks.rank > 0:
            return
        if failed:
            reasons = "; ".join(
                f"{each.unit.what} of {each.unit.model}: {each.words}" for each in failed[:3]
            )
            text = f"evaluate.tasks: {reasons}; what else was measured is kept for the next try"
            raise RuntimeError(text) from failed[0].error  # a broken line is worth another try
        report = _assembled(config, bench)
        write_json(temporary / FILE, report)
        write_page(workspace.root, temporary)

    def summary() -> Summary:
        judged = _judged(config, gate, folder)
        of = length_notes(config, read_config(bench.folders["student"]), "validation")
        return replace(judged, notes=(*judged.notes, *of, *vocabulary_notes(read_report(folder))))

    def check() -> None:
        _check_models(config, bench.folders["teacher"])
        _check_answers(config, bench.folders)

    return Recipe(folder, "report", settings, inputs, build, summary, check)


def _check_models(config: Config, teacher: Path) -> None:
    """Refuses what the models cannot be asked for, before anything is measured.

    Raises:
        ValueError: continuations longer than the model, or tasks with a tokenizer that marks neither
            begin nor end, on which lm-eval conditions a text's first token.
    """
    hf_config, length = read_config(teacher), config.evaluate.written_tokens
    most = hf_config[POSITIONS] if POSITIONS in hf_config else None
    shortest = EvaluateConfig().written_tokens  # a toy of fewer positions is measured all the same
    if config.evaluate.prompts and isinstance(most, int) and length > max(most, shortest):
        raise ValueError(
            f"evaluate.written_tokens: expected at most {most:,}, the model's positions ({POSITIONS} in "
            f"its config.json), found {length:,}"
        )
    if config.evaluate.tasks:
        from nemo_minitron.models.causal_lm import load_tokenizer

        tokenizer = load_tokenizer(teacher)
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(
                f"evaluate.tasks: {teacher}: its tokenizer has neither a begin nor an end token, which "
                "lm-eval puts before a text; name one in tokenizer_config.json (eos_token), or leave the "
                "tasks out"
            )


def _check_answers(config: Config, folders: Mapping[str, Path]) -> None:
    """Refuses a chat without a template, and back ends that are not there.

    Raises:
        ValueError: it is so.
    """
    settings = config.evaluate
    if not settings.tasks:
        return
    if settings.chat:
        from nemo_minitron.models.causal_lm import load_tokenizer

        check_chat(folders["teacher"], load_tokenizer(folders["teacher"]))
    from nemo_minitron.evaluation.task_backends import check_backend

    check_backend(settings.backend, settings.servers, folders, settings.device)


def _check(config: Config) -> None:
    """Refuses what could not be measured, before anything is.

    Raises:
        ValueError: an unknown task, or no size to time.
    """
    if config.evaluate.tasks:
        from nemo_minitron.evaluation.lm_eval import check_tasks

        check_tasks(config.evaluate.tasks, config.evaluate.task_dir)
    if config.evaluate.speed and not config.evaluate.speed_batches:
        raise ValueError("evaluate.speed_batches: expected at least one size, found []")


def _judged(config: Config, gate: Gate, folder: Path) -> Summary:
    """Holds the report against the gate."""
    report = read_report(folder)
    rows = judge(folder, gate, report)
    student = report["models"]["student"]
    headline = f"the student's perplexity retention is {student['retention']:.1%}"
    failed = [row for row in rows if not row[3]]
    if gate.asks and not config.export.force:
        raise_if_failed(rows)
    notes = tuple(
        f"the quality gate failed: {row[0]}: {row[2]}, asked for {row[1]}" for row in failed
    )
    return Summary(headline, columns(report), table(report), report["models"], notes)


def _bench(config: Config) -> tuple[Bench, list[Input]]:
    workspace = Workspace(workspace_of(config))
    models, inputs = _models(config)
    texts = validation_text(config)
    inputs.append(text_input(texts))
    entries = entries_of_all(config, models)
    prints = _task_prints(config)
    if prints:
        inputs.append(Input(config.evaluate.task_dir or "lm_eval", digest(prints)))
    return Bench(
        config, models, texts.fingerprint, workspace.held_out_tasks(texts.fingerprint), prints,
        Results(workspace.results),
        entries, _dtypes(config, models),
    ), inputs  # fmt: skip


def _task_prints(config: Config) -> dict[str, dict[str, str | None]]:
    if not config.evaluate.tasks:
        return {}
    from nemo_minitron.evaluation.task_files import task_print

    return {name: task_print(name, config.evaluate.task_dir) for name in config.evaluate.tasks}


def _dtypes(config: Config, models: Mapping[str, Path]) -> dict[str, str]:
    """What was trained here lies in float32 and is measured as it goes out: in the export's dtype."""
    if config.evaluate.model is not None:
        return {}
    source = uncorrected(config)
    dtype = config.export.dtype or main_dtype(open_checkpoint(source))
    as_they_are = ("pruned", *config.evaluate.beside)
    teacher = [] if is_corrected(config, models["teacher"]) else ["teacher"]
    return {
        name: dtype
        for name, folder in models.items()
        if name not in (*as_they_are, *teacher) and folder != source
    }


def _models(config: Config) -> tuple[dict[str, Path], list[Input]]:
    models, inputs = _own_models(config)
    for name, text in config.evaluate.beside.items():
        if not is_beside(name):
            raise ValueError(
                f"evaluate.beside: expected a name of letters, digits and dashes other than "
                f"{', '.join(NAMES)}, found {plain(name, 40)!r}"
            )
        models[name], item = model_folder(config, f"evaluate.beside.{name}", text)
        inputs.append(item)
    return models, inputs


def _own_models(config: Config) -> tuple[dict[str, Path], list[Input]]:
    workspace = Workspace(workspace_of(config))
    if config.evaluate.teacher is None:
        teacher, item = teacher_folder(config)
    else:
        teacher, item = model_folder(config, "evaluate.teacher", config.evaluate.teacher)
    models, inputs = {"teacher": teacher}, [item]
    if config.evaluate.model is not None:
        models["student"], item = model_folder(config, "evaluate.model", config.evaluate.model)
        return models, [*inputs, item]
    for name, artifact, stage, trained in (
        ("pruned", "pruned", "prune", False),
        ("student", "student", "distill", True),
        ("scratch", "scratch", "pretrain", True),
    ):
        if name == "scratch" and not (
            config.evaluate.from_scratch and read_manifest(workspace.artifact(artifact))
        ):
            continue
        folder = workspace.artifact(artifact)
        models[name] = model_in(folder) if trained else folder
        inputs.append(input_artifact(workspace.root, artifact, stage))
    return models, inputs


def _write_tasks(config: Config, bench: Bench) -> None:
    """Writes the data of the tasks that are made from held-out text, where it is not there yet."""
    from nemo_minitron.evaluation.held_out_tasks import held_out_data, is_made_here

    if any(map(is_made_here, config.evaluate.tasks)):
        held_out_data(validation_text(config), bench.tasks)


def _assembled(config: Config, bench: Bench) -> dict[str, Any]:
    """The report: a row per model, what is between them, and what they write."""
    found = {unit: bench.measure(unit) for unit in bench.units()}
    models = {name: _row(bench, name, found) for name in bench.folders}
    tasks = {name: found[Unit("teacher", name)] for name in config.evaluate.tasks}
    better = {
        name: found[Unit("student", name)]["better"] | task["better"]
        for name, task in tasks.items()
    }
    report: dict[str, Any] = {
        "workspace": workspace_of(config).resolve().name,
        "dtype": bench.dtypes.get("student"),
        "models": models,
        "better": better,
        "data_sets": {name: task["data_set"] for name, task in tasks.items() if task["data_set"]},
        "compared": _compared(bench, found),
        "measured_on": {
            "text": bench.text, **bench.windows(),
            "task_limit": config.evaluate.task_limit, "tasks": bench.prints,
            "tokenizer": tokenizer_fingerprint(bench.folders["teacher"]), **_asked(config),
        },
    }  # fmt: skip
    if isinstance(bench.vocabulary, KeptEntries):
        report["vocabulary"] = {
            "kept": len(bench.vocabulary.ids_V), "of": bench.checkpoint("teacher").architecture.sizes[VOCAB],
            "held_out": bench.covered(),
        }  # fmt: skip
        report["measured_on"]["entries"] = digest(bench.vocabulary.ids_V.tolist())
    if config.evaluate.prompts:
        report["prompts"] = len(found[Unit("teacher", WRITING)]["ids"])  # a short text has fewer
        report["writing"] = _writing(bench, found)
    return report


def _asked(config: Config) -> dict[str, Any]:
    """How tasks were asked, where not as they say."""
    asked = answers_of(config.evaluate).decides() if config.evaluate.tasks else {}
    return {"asked": asked} if asked else {}


def _row(bench: Bench, name: str, found: Mapping[Unit, Any]) -> dict[str, Any]:
    checkpoint, settings = bench.checkpoint(name), bench.config.evaluate
    size = model_size(checkpoint.architecture)
    text, first = found[Unit(name, TEXT)], found[Unit("teacher", TEXT)]
    loss = text["loss"] if bench.cut(name) is None else loss_by_teacher_token(text, first)
    row: dict[str, Any] = {
        "parameters": size.parameters,
        "non_embedding": size.non_embedding,
        "flops_per_token": size.flops_per_token,
        "kv_bytes_per_token": size.kv_bytes_per_token,
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": text["tokens"],
        "retention": math.exp(first["loss"] - loss),
        "divergence": text["divergence"],
        "top1": text["top1"],
    }
    if "bytes" in text:
        row["bits_per_byte"] = bits_per_byte(text)
        row["tokens_per_byte"] = text["tokens"] / sum(text["bytes"])
        row["own_loss"] = text["loss"]
    if settings.prompts:
        from torch import tensor

        from nemo_minitron.evaluation.generation import agreement

        own, theirs = found[Unit(name, WRITING)], found[Unit("teacher", WRITING)]
        if "theirs" in own:
            theirs, written = {"ids": own["theirs"]}, own["in_teacher_ids"]
        else:
            written = own["ids"]
        row["writing"] = {
            "teacher_loss": own["teacher_loss"], "repetition": own["repetition"],
            "agreement": agreement(tensor(theirs["ids"]), tensor(written)),
        }  # fmt: skip
    if settings.tasks:
        row["tasks"] = {task: found[Unit(name, task)]["metrics"] for task in settings.tasks}
    if settings.speed:
        row["speed"] = found[Unit(name, SPEED)]
    return row


def _compared(bench: Bench, found: Mapping[Unit, Any]) -> list[dict[str, Any]]:
    """Each model against the teacher, document by document, in everything that has a number for each."""
    from nemo_minitron.evaluation.held_out_tasks import documents_of

    bytewise = isinstance(bench.vocabulary, KeptEntries)
    metric = "bits per byte" if bytewise else "loss"
    measures = [("held-out text", metric, TEXT, "losses", False)]
    tasks, limit = bench.config.evaluate.tasks, bench.config.evaluate.task_limit
    for task in tasks:
        first, *others = (found[Unit(name, task)] for name in bench.folders)
        shared = [m for m in first["documents"] if all(m in other["documents"] for other in others)]
        measures += [(task, metric, task, metric, first["better"][metric]) for metric in shared]
    whose = {task: documents_of(task, bench.tasks, limit) for task in tasks}
    rows, whose[TEXT] = [], found[Unit("teacher", TEXT)]["documents"]
    for task, metric, what, series, better in measures:
        values = {}
        for name in bench.folders:
            own = found[Unit(name, what)]
            values[name] = own[series] if what == TEXT else own["documents"][series]
            if what == TEXT and bytewise:
                values[name] = bits_of_samples(own)
        means = {name: sum(value) / len(value) for name, value in values.items()}
        for name in [name for name in values if name != "teacher"]:
            gap = paired(values["teacher"], values[name], whose[what])
            back = None
            if name == "student" and "pruned" in means:
                back = recovered(means["teacher"], means["pruned"], means[name], better)
            rows.append({
                "task": task, "metric": metric, "higher_is_better": better, "model": name, **asdict(gap),
                "recovered": back,
            })  # fmt: skip
    return rows


def _writing(bench: Bench, found: Mapping[Unit, Any]) -> list[dict[str, str]]:
    """The first few beginnings, and how each model goes on."""
    written = {name: found[Unit(name, WRITING)] for name in bench.folders}
    first = written["teacher"]
    return [
        {"prompt": first["prompts"][i], "text": first["truth"][i]}
        | {name: own["texts"][i] for name, own in written.items()}
        for i in range(min(_SHOWN, len(first["texts"])))
    ]
