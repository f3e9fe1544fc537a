"""logits: runs the teacher once over what distillation will read, and keeps a few entries per token."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.data.mixtures import validation_samples
from nemo_minitron.data.training_samples import sample_fingerprint, training_samples
from nemo_minitron.distillation import teacher_logits
from nemo_minitron.distillation.teacher_logits import (
    TeacherLogits,
    part_name,
    token_bytes,
    write_part,
)
from nemo_minitron.losses.kept_entries import Entries, KeptEntries
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.stages.inputs import (
    distillation_teacher,
    length_notes,
    teacher_folder,
)
from nemo_minitron.stages.logit_cache import asked_for, refuse_phases
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.stages.training_stage import (
    resolved_trainer,
    samples_a_step,
    samples_for,
    tokenizer_of,
    training_inputs,
)
from nemo_minitron.stages.vocabularies import kept_ids, taught_entries
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.progress_bar import bar
from nemo_minitron.workspace.typed_json import read_json


def recipe(config: Config) -> Recipe:
    """Writes the cache, a part at a time; a killed run resumes at its part, ranks take parts in turn.

    Raises:
        ValueError: the teacher has another vocabulary, or more entries are asked for than it has.
    """
    refuse_phases(config)
    teacher, teacher_input = distillation_teacher(config)
    settings, folder = config.distill.cache, Workspace(workspace_of(config)).logits
    inputs = [teacher_input, *training_inputs(config)]
    if kept_ids(config) is None:
        source, _ = teacher_folder(config)
    else:  # the samples are made of the student's entries
        workspace = Workspace(workspace_of(config))
        source = workspace.pruned
        inputs.append(input_artifact(workspace.root, "pruned", "prune"))
    vocabulary = taught_entries(config, teacher, source)
    size = _entries(vocabulary, teacher)
    if settings.entries > size and settings.method == "top_k":
        raise ValueError(
            f"distill.cache.entries: expected at most the vocabulary's {size}, found {settings.entries}"
        )
    trainer = resolved_trainer(config, {}, config.distill.batch_size)
    needed = samples_for(config, trainer, config.distill.batch_size)
    decides = asked_for(config) | {"samples": needed}

    def build(state: Path, target: Path, ranks: Ranks) -> None:
        facts = _teach(config, teacher, source, needed, vocabulary, state, ranks)
        if ranks.rank > 0:
            return
        for path in sorted(state.glob("part-*.safetensors")):
            _also(path, target / path.name)
        write_json(target / teacher_logits.FILE, facts)

    def summary() -> Summary:
        facts = TeacherLogits(folder).facts
        notes = length_notes(config, read_config(teacher), "train", "validation")
        return Summary(_headline(facts), facts=dict(facts), notes=notes)

    def check() -> None:
        from nemo_minitron.models.int8 import check_teacher

        check_teacher(config.distill.teacher_dtype, config.trainer["accelerator"])

    return Recipe(folder, "logits", decides, inputs, build, summary, check, resumable=True)


def _also(path: Path, target: Path) -> None:
    """Gives a part a second name: whoever is killed while they are hashed still finds it in the state."""
    try:
        os.link(path, target)
    except OSError:  # a file system without
        path.replace(target)


def _headline(facts: Any) -> str:
    tokens = f"{facts['tokens']:,} tokens, {facts['bytes_per_token']} bytes each"
    if facts["method"] == "sampling":
        return f"{tokens}, {facts['entries']} drawn entries"
    return f"{tokens}, {facts['entries']} entries with {facts['mass']:.1%} of the mass"


def _teach(
    config: Config,
    teacher: Path,
    source: Path,
    needed: int,
    vocabulary: Entries,
    state: Path,
    ranks: Ranks,
) -> dict[str, Any]:
    """Writes this rank's parts, and says what all of them are."""
    import torch

    from nemo_minitron.distillation.teacher_logits_pass import Kept, teach
    from nemo_minitron.families import family_of
    from nemo_minitron.models.causal_lm import pick_device

    settings = config.distill.cache
    tokenizer = tokenizer_of(source)
    trainer = resolved_trainer(config, {}, config.distill.batch_size)
    per_step = samples_a_step(config, trainer, config.distill.batch_size)
    samples = training_samples(config, tokenizer, needed, per_step, ranks)
    validation_NS = validation_samples(config, tokenizer)
    hf_config = read_config(teacher)
    size, outside = _entries(vocabulary, teacher), _outside(vocabulary)
    each = token_bytes(settings.method, settings.entries, size) + 2 * (outside == "tail")
    rows_per_part = max(1, teacher_logits.PART_BYTES // (samples.positions * each))
    parts = [(samples, list(rows)) for rows in _cut(len(samples), rows_per_part)]
    first = len(parts) * rows_per_part
    parts += [(validation_NS, list(rows)) for rows in _cut(len(validation_NS), rows_per_part)]
    due = [
        n for n in range(ranks.rank, len(parts), ranks.size) if not (state / part_name(n)).is_file()
    ]
    device = pick_device("cpu" if config.trainer["accelerator"] == "cpu" else "auto")
    device = torch.device("cuda", ranks.local) if device.type == "cuda" else device
    model = _load(config, teacher, device, ranks) if due else None
    with bar("teacher", sum(len(parts[n][1]) for n in due) * samples.positions) as advance:
        for number in due:
            given, rows = parts[number]
            kept = Kept(
                settings.method, settings.entries, config.distill.temperature,
                settings.seed * 1_000_003 + number, vocabulary,
            )  # fmt: skip
            targets, mass = teach(
                model, family_of(hf_config), given, rows, kept, settings.batch_size, advance
            )
            write_json(state / f"mass-{number:05}.json", mass)
            write_part(state, number, targets, len(rows), size)
    ranks.gather(None)  # all parts are there
    return {
        "method": settings.method, "entries": settings.entries, "temperature": config.distill.temperature,
        "rows": len(samples), "rows_per_part": rows_per_part, "validation": first,
        "samples": sample_fingerprint(samples), "vocabulary": size,
        "tokens": len(samples) * samples.positions, "bytes_per_token": each,
        "mass": _mean_mass(state, _cut(len(samples), rows_per_part)),
        **({} if outside is None else {"outside": outside}),
    }  # fmt: skip


def _entries(vocabulary: Entries, teacher: Path) -> int:
    """Entries that count."""
    if isinstance(vocabulary, KeptEntries):
        return len(vocabulary.ids_V)
    return vocabulary or int(read_config(teacher)["vocab_size"])


def _outside(vocabulary: Entries) -> str | None:
    return vocabulary.outside if isinstance(vocabulary, KeptEntries) else None


def _load(config: Config, folder: Path, device: Any, ranks: Ranks) -> Any:
    """The teacher, computing on the device."""
    from nemo_minitron.families import family_of
    from nemo_minitron.models.int8 import left_out, load_teacher
    from nemo_minitron.models.offload import Offloaded

    settings, family = config.distill, family_of(read_config(folder))
    offload = settings.teacher_place == "offload"
    model = load_teacher(folder, settings.teacher_dtype, None if offload else device)
    left = left_out(model, family) if settings.teacher_dtype == "fp8" else None
    if left is not None and ranks.rank == 0:
        print(left, file=sys.stderr)
    if offload:
        Offloaded(model, family, device)
    return model


def _cut(rows: int, size: int) -> list[range]:
    return [range(start, min(rows, start + size)) for start in range(0, rows, size)]


def _mean_mass(state: Path, parts: Sequence[range]) -> float:
    """Mass that the kept entries have of the teacher's, mean over the training's rows.

    Args:
        state: folder with each part's mean.
        parts: rows of each part of the training's samples, which come first.
    """
    sums = [
        read_json(state / f"mass-{n:05}.json", float) * len(rows) for n, rows in enumerate(parts)
    ]
    return sum(sums) / sum(map(len, parts))
