"""export: the student as a Hugging Face folder that plain transformers loads, with a card and a proof."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.checkpoint import (
    Checkpoint,
    main_dtype,
    open_checkpoint,
)
from nemo_minitron.checkpoints.dtypes import STORED
from nemo_minitron.checkpoints.gguf_file import SUFFIX
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.side_files import copy_side_files, processor_files
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.evaluation.export_vocabulary import in_runs
from nemo_minitron.evaluation.gate import LINEAGE, gate_of, judge, raise_if_failed
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.families import VOCAB, find_row
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.plan_file import cut_of, read_plan
from nemo_minitron.pruning.slice_predictions import CutPredictions
from nemo_minitron.pruning.slice_wrapper import CutSurroundings, write_causal_lm, write_whole
from nemo_minitron.release.model_card import card_text
from nemo_minitron.release.quickstart import check_in_clean_process
from nemo_minitron.scoring.magnitude import magnitudes
from nemo_minitron.stages.inputs import refuse_gguf
from nemo_minitron.stages.origin import origin_of, uncorrected
from nemo_minitron.stages.result import Result
from nemo_minitron.workspace.artifacts import artifacts_in, check_bytes, input_artifact
from nemo_minitron.workspace.build import make
from nemo_minitron.workspace.layout import Workspace, manifest_in, model_in
from nemo_minitron.workspace.manifest import Input, read_manifest, write_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _check_told(workspace: Workspace, student: Input) -> None:
    """Refuses a report, or a plan, of another model than the one that goes out.

    Raises:
        ValueError: it does.
    """
    manifest = read_manifest(workspace.report)
    assert manifest is not None
    measured = [item for item in manifest.inputs if item.path == student.path]
    if student.fingerprint not in [item.fingerprint for item in measured]:
        raise ValueError(
            f"{workspace.report}: measures another model than this workspace's student (evaluate.model); "
            "run 'minitron evaluate' without it"
        )
    if student.finished not in [
        item.finished for item in measured
    ]:  # the same recipe, made once more
        raise ValueError(
            f"{workspace.report}: measures an earlier student of this workspace; "
            "run 'minitron evaluate' again"
        )
    if read_manifest(workspace.pruned) is not None:  # else: cleaned away
        input_artifact(workspace.root, "pruned", "prune")  # by the plan that the card tells of


def run(config: Config) -> Result:
    """Writes the export, loads it in a clean process, and uploads it where that is asked for.

    Raises:
        ValueError: an unknown dtype.
        GateError: the student is too weak, and ``export.force`` is not set.
        RuntimeError: plain transformers does not load it, or computes something else.
    """
    workspace = Workspace(workspace_of(config))
    if config.export.dtype is not None and config.export.dtype not in _DTYPES:
        raise ValueError(
            f"export.dtype: expected one of {', '.join(_DTYPES)}, found {config.export.dtype!r}"
        )
    inputs = [
        input_artifact(workspace.root, "student", "distill"),
        input_artifact(workspace.root, "report", "evaluate"),
    ]
    _check_told(workspace, inputs[0])
    report = read_report(workspace.report)
    rows = judge(workspace.report, gate_of(config), report)
    failed = [row for row in rows if not row[3]]
    if not config.export.force:
        raise_if_failed(rows)
    source = uncorrected(config)
    checkpoint, student = open_checkpoint(source), model_in(workspace.student)
    refuse_gguf(config, open_checkpoint(student), source)
    dtype = config.export.dtype or main_dtype(checkpoint)
    dtypes = {} if config.export.dtype else _row_dtypes(checkpoint)
    around = _surroundings(config, workspace, checkpoint)
    behind = _predictions(workspace, checkpoint)
    settings = {**_settings(config, around is not None), "dtype": dtype, "failed": failed}

    def build(temporary: Path) -> dict[str, str]:
        """Writes model, card and lineage, and tries them; returns the weights' hashes."""
        check_bytes(workspace.student)  # read anyway, and vouched for by the new manifest
        hashes = _write_model(student, temporary, dtype, dtypes, config, around, behind)
        own = VOCAB in read_plan(workspace.plan).keep  # the source's tokenizer is another one
        if not own:
            copy_side_files(source, temporary)
        card = _card(config, workspace, temporary, source, failed)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if report["data_sets"]:
            from nemo_minitron.release.card_metadata import write_eval_results

            write_eval_results(temporary, report)
        write_json(temporary / LINEAGE, _lineage(workspace, report))
        left_out = () if behind is None else behind.beginnings
        check_in_clean_process(temporary, student, dtype, around is not None, left_out)
        _write_gguf(config, workspace, temporary, source)
        return hashes

    folder = workspace.export
    made = make(folder, "export", settings, inputs, build)
    headline = f"{folder} loads with plain transformers; same logits as the student in {dtype}"
    if config.export.nemo:
        headline += f"; {_nemo(folder, workspace.archive)}"
    if config.export.push_to_hub:
        headline += f"; uploaded: {_upload(config, folder)}"
    return Result("export", folder, made, headline)


def _write_gguf(config: Config, workspace: Workspace, folder: Path, source: Path) -> None:
    if config.export.gguf:
        from nemo_minitron.release.card_metadata import licence_of
        from nemo_minitron.release.gguf_export import write_gguf

        name = re.sub(r"[^\w.-]+", "-", _name(config, workspace, folder))
        licence = config.export.license or licence_of(source)[0].get("license")
        named = licence if isinstance(licence, str) else None
        write_gguf(folder, source, name, config.export.gguf, config.export.gguf_pre, named)


def _settings(config: Config, whole: bool) -> dict[str, Any]:
    """What an export is made by; without keys that ask for nothing, so that older ones stay good."""
    settings = asdict(config.export)
    for name in ("push_to_hub", "public", "revision", "tag", "force", "nemo", "text_only"):
        del settings[name]
    if not config.export.gguf:
        del settings["gguf"], settings["gguf_pre"]
    return {**settings, "whole": True} if whole else settings


def _nemo(export: Path, archive: Path) -> str:
    """Writes the export as a .nemo archive too, where there is none as new as the export."""
    if not archive.is_file() or archive.stat().st_mtime_ns < manifest_in(export).stat().st_mtime_ns:
        from nemo_minitron.plugin.model import MinitronModel
        from nemo_minitron.plugin.nemo_archive import nemo_archive

        nemo_archive(MinitronModel.from_hf(export, dtype="auto"), archive)
    return f"NeMo archive {archive}"


def _upload(config: Config, folder: Path) -> str:
    from nemo_minitron.release.hub_upload import upload

    settings = config.export
    assert settings.push_to_hub is not None
    return upload(
        folder, settings.push_to_hub, not settings.public, settings.revision, settings.tag
    )


def _row_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """Rows of the family's table to the dtype that the source stores their tensors in."""
    found: dict[str, Counter[str]] = {}
    for name, entry in checkpoint.entries.items():
        match = find_row(checkpoint.family, name)
        if match is not None:
            found.setdefault(match[0].pattern, Counter())[STORED[entry.dtype]] += 1
    return {pattern: counts.most_common(1)[0][0] for pattern, counts in found.items()}


def _surroundings(
    config: Config, workspace: Workspace, source: Checkpoint
) -> CutSurroundings | None:
    """What lies around a multimodal source's text model, cut along; None: that model alone goes out."""
    if source.around is None or config.export.text_only:
        return None
    plan = read_plan(workspace.plan)
    return CutSurroundings(source, cut_of(plan, source.architecture))


def _predictions(workspace: Workspace, source: Checkpoint) -> CutPredictions | None:
    """The source's prediction layers, cut along; None: the plan keeps none.

    They come from the source, since no training knows them.
    """
    plan = read_plan(workspace.plan)
    if not plan.mtp_kept:
        return None
    return CutPredictions(source, cut_of(plan, source.architecture), magnitudes)


def _write_model(
    student: Path,
    folder: Path,
    dtype: str,
    dtypes: Mapping[str, str],
    config: Config,
    around: CutSurroundings | None,
    behind: CutPredictions | None,
) -> dict[str, str]:
    """Streams the student's weights into the export, cast to its dtype; rows in ``dtypes`` to their own.

    What lies around the causal LM keeps the source's dtypes, unless ``export.dtype`` is set.
    """
    checkpoint = open_checkpoint(student)

    def of(name: str) -> torch.dtype:
        match = find_row(checkpoint.family, name)
        return _DTYPES[dtype if match is None else dtypes.get(match[0].pattern, dtype)]

    stored = {"dtype": dtype, "torch_dtype": dtype}
    model = checkpoint.architecture
    if behind is not None:
        model = replace(model, config={**model.config, **behind.config})
    shard_bytes = config.export.shard_size
    if around is None:
        hashes = write_causal_lm(checkpoint, folder, of, shard_bytes, behind)
        # where it is missing, as in a GGUF file, some versions of transformers warn of the tokenizer
        made_by = {"transformers_version": version("transformers")}
        write_json(folder / "config.json", both_spellings({**made_by, **model.config, **stored}))
    else:
        other = None if config.export.dtype is None else _DTYPES[dtype]
        hashes = write_whole(checkpoint, around, folder, of, other, shard_bytes, behind)
        write_json(folder / "config.json", {**around.config(model), **stored})
        for path in processor_files(around.source):
            (folder / path.name).write_bytes(around.processor_file(path))
    copy_side_files(student, folder)
    return hashes


def _lineage(workspace: Workspace, report: Mapping[str, Any]) -> dict[str, Any]:
    """Where the export comes from, every artifact's recipe, fingerprint and inputs; and what was measured."""
    stages = []
    for folder in artifacts_in(workspace.root):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.kind != "export":
            entry = asdict(manifest)
            stages.append(
                {
                    key: entry[key]
                    for key in ("kind", "package", "config", "inputs", "fingerprint", "finished")
                }
            )
    student = {
        key: report["models"]["student"].get(key)
        for key in ("loss", "perplexity", "retention", "tasks")
    }
    results = {
        "student": {**student, "tasks": student["tasks"] or {}},
        "measured_on": report["measured_on"],
    }
    made = {"made_by": "nemo_minitron", "results": results, "stages": stages}
    plan = read_plan(workspace.plan)
    if plan.vocabulary is None:
        return made
    # so that it can be measured in any workspace
    kept = {"ids": in_runs(plan.keep[VOCAB].tolist())} if VOCAB in plan.keep else {}
    return {**made, "vocabulary": {**asdict(plan.vocabulary), **kept}}


def _card(
    config: Config,
    workspace: Workspace,
    folder: Path,
    source: Path,
    failed: Sequence[tuple[str, str, str, str]],
) -> str:
    from nemo_minitron.release.card_metadata import licence_of, model_card

    report = read_report(workspace.report)
    plan = read_plan(workspace.plan)
    origin = origin_of(workspace)
    from_hub = origin.pointer.revision is not None
    name = _name(config, workspace, folder)
    around = open_checkpoint(folder).around
    whole = None if around is None else around.wrapper.model_type
    results = [
        (
            "held-out perplexity",
            "held-out text",
            "perplexity",
            report["models"]["student"]["perplexity"],
        )
    ]
    limit = report["measured_on"]["task_limit"]
    limited = "" if limit is None else f", first {limit} questions"
    for task, metrics in report["models"]["student"].get("tasks", {}).items():
        results += [
            (f"{task}{limited}", task, metric, value)
            for metric, value in metrics.items()
            if not metric.endswith("_stderr")
        ]
    if config.export.license:
        licence, untaken = {"license": config.export.license}, {}
    else:
        licence, untaken = licence_of(source)
        first, rest = licence_of(origin.folder)
        if not licence or licence == first:  # what an export cannot carry over, the next one can
            licence, untaken = first, rest
    steps = origin.cuts + 1
    return model_card(
        card_text(name, asdict(origin.pointer), plan, report, failed, untaken, whole, steps),
        base_model=origin.pointer.given if from_hub else None,
        licence=licence,
        name=name,
        results=results,
        multimodal=whole is not None,
    )


def _name(config: Config, workspace: Workspace, folder: Path) -> str:
    """The model's name: the user's, or made of its source's and its size."""
    size = model_size(open_checkpoint(folder).architecture)
    origin = origin_of(workspace).name.removesuffix(SUFFIX)
    return config.export.name or f"{origin}-minitron-{_short(size.parameters)}"


def _short(parameters: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= limit:
            return f"{parameters / limit:.1f}{unit}"
    return str(parameters)
