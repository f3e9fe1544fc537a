"""distill: the pruned model learns from the teacher's logits ([P1] section 3)."""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.config.distill_config import DistillConfig, IntermediateConfig
from nemo_minitron.data.training_samples import sample_fingerprint
from nemo_minitron.distillation.teacher_logits import TeacherLogits
from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.intermediate import IntermediateWeights
from nemo_minitron.pruning.plan_file import read_plan
from nemo_minitron.stages.inputs import (
    distillation_teacher,
    refuse_gguf,
)
from nemo_minitron.stages.logit_cache import asked_for, refuse_phases
from nemo_minitron.stages.origin import uncorrected
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.stages.training_stage import Role, tokenizer_of, training_inputs, training_recipe
from nemo_minitron.stages.vocabularies import kept_ids, taught_entries
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace, state_in
from nemo_minitron.workspace.manifest import read_manifest


def recipe(config: Config) -> Recipe:
    """Trains the pruned model against the teacher, or against what is kept of its logits.

    Raises:
        ValueError: the teacher has another vocabulary or tokenizer, or a setting is out of range.
    """
    workspace = Workspace(workspace_of(config))
    settings = config.distill
    divergence = _divergence(settings)
    inside = _intermediate(settings.intermediate)
    if settings.kl < 0 or settings.ce < 0 or settings.kl + settings.ce == 0:
        raise ValueError(
            f"distill: kl and ce must not be negative, nor both 0, found {settings.kl} and {settings.ce}"
        )
    pruned = workspace.pruned
    inputs = [input_artifact(workspace.root, "pruned", "prune"), *training_inputs(config)]
    if config.export.gguf:
        refuse_gguf(config, open_checkpoint(pruned), uncorrected(config))
    if settings.teacher_logits == "cache":
        inputs.append(input_artifact(workspace.root, "logits", "logits"))
        callbacks, wrap_samples = _cached(config, pruned, divergence, inside)
    else:
        teacher, teacher_input = distillation_teacher(config)
        inputs.append(teacher_input)
        callbacks, wrap_samples = _online(config, teacher, pruned, divergence, inside)

    def start() -> tuple[Any, dict[str, Any], Path]:
        import torch

        from nemo_minitron.models.causal_lm import load_model

        return load_model(pruned, dtype=torch.float32), read_config(pruned), pruned

    role = Role(
        lambda: tokenizer_of(pruned),
        start,
        lambda: read_config(pruned),
        callbacks,
        terms=[
            *(["divergence"] if settings.kl else []),
            *(["intermediate", "alpha"] if inside else []),
        ],
        wrap_samples=wrap_samples,
    )
    section = _section(config)
    made = training_recipe(workspace.student, "student", config, section, inputs, role)

    def check() -> None:
        from nemo_minitron.models.int8 import check_teacher

        if settings.teacher_logits == "online":
            check_teacher(settings.teacher_dtype, config.trainer["accelerator"])
        made.check()

    return replace(made, check=check, summary=lambda: _with_note(settings, made.summary()))


_DRAWN = (
    "divergence and val_divergence are the mean of -log q over drawn entries: KL from the teacher and the "
    "teacher's own entropy together; they compare with other trainings from drawn entries only"
)


def _with_note(settings: DistillConfig, summary: Summary) -> Summary:
    """The summary of a student, with a note where a logged divergence is not a plain one."""
    drawn = settings.teacher_logits == "cache" and settings.cache.method == "sampling"
    return replace(summary, notes=(*summary.notes, _DRAWN)) if drawn and settings.kl else summary


def _section(config: Config) -> dict[str, Any]:
    """The keys of ``distill`` that decide the weights, and where the training resumes from.

    Raises:
        ValueError: they exclude each other.
    """
    settings = config.distill
    elsewhere = ("teacher", "teacher_place", "cache", "chunk_tokens")
    section = {**asdict(settings), **dict.fromkeys(elsewhere), "trainer": {}, "optim": {}}
    section["live_teacher"] = settings.live_teacher is not None  # wherever it lies
    if kept_ids(config) is None:  # it decides nothing
        del section["outside"]
    if settings.stop_after is None:
        del section["stop_after"]
    if settings.go_on_from is not None and settings.live_teacher is not None:
        raise ValueError(
            "distill.go_on_from: not with distill.live_teacher, whose teachers lie beside the state"
        )
    return section


Teaching = tuple[Callable[[], list[Any]], Callable[[Any, Any], tuple[Any, Any]]]
"""What gives the callbacks, and what becomes of the samples."""


def _online(
    config: Config,
    teacher: Path,
    pruned: Path,
    divergence: Divergence,
    inside: IntermediateWeights | None,
) -> Teaching:
    """The teacher runs beside the student."""
    settings = config.distill
    vocabulary = taught_entries(config, teacher, pruned)
    _check_place(settings, config.training.parallel)
    if config.training.tensor_parallel > 1 and inside is not None and "attention" in inside.terms:
        raise ValueError(
            "distill.intermediate.terms: attention compares whole queries, keys and values, and "
            f"training.tensor_parallel={config.training.tensor_parallel} splits them; use 1, or other terms"
        )
    if settings.live_teacher is not None and config.correct.enabled:
        raise ValueError(
            "distill.live_teacher: correct.enabled=true corrects the teacher before it is pruned; choose one"
        )

    def callbacks() -> list[Any]:
        """The distillation, and what exchanges its teacher; loads the teacher."""
        from nemo_minitron.families import family_of
        from nemo_minitron.losses.fused_linear_loss import LossWeights
        from nemo_minitron.models.int8 import left_out, load_teacher
        from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
        from nemo_minitron.plugin.live_teacher import LiveTeacher

        weights = LossWeights(settings.kl, settings.ce, divergence)
        family = family_of(read_config(teacher))
        kept_H = _kept(config) if inside is not None and settings.teacher is None else None

        def load(folder: Path) -> Any:
            return load_teacher(folder, settings.teacher_dtype)

        model = load(teacher)
        left = left_out(model, family) if settings.teacher_dtype == "fp8" else None
        if left is not None and os.environ.get("RANK", "0") == "0":
            print(left, file=sys.stderr)
        distillation = KnowledgeDistillation(
            model, family, weights, settings.chunk_tokens, vocabulary, inside, kept_H,
            settings.teacher_place,
        )  # fmt: skip
        if settings.live_teacher is None:
            return [distillation]
        state = state_in(Workspace(workspace_of(config)).student)
        if not Path(settings.live_teacher).is_dir() and os.environ.get("RANK", "0") == "0":
            print(
                f"distill.live_teacher: {settings.live_teacher} is not there yet; until something is "
                f"published in it, the teacher is {teacher}",
                file=sys.stderr,
            )
        return [distillation, LiveTeacher(Path(settings.live_teacher), state, distillation, load)]

    return callbacks, lambda samples, validation: (samples, validation)


def _check_place(settings: DistillConfig, parallel: str) -> None:
    """Refuses a place for the teacher that does not go with its other settings.

    Raises:
        ValueError: it does not.
    """
    if settings.teacher_place == "shard" and parallel != "shard":
        raise ValueError(
            "distill.teacher_place=shard: needs training.parallel=shard, found replicate"
        )
    if settings.teacher_place == "shard" and (
        settings.live_teacher or settings.teacher_dtype in ("int8", "fp8")
    ):
        raise ValueError(
            "distill.teacher_place=shard: neither with distill.live_teacher nor with teacher_dtype=int8 or "
            "fp8; use device or cpu (fp8: device or offload)"
        )
    if settings.teacher_place == "cpu" and settings.teacher_dtype == "fp8":
        raise ValueError(
            "distill.teacher_place=cpu: the CPU has no product in fp8; use teacher_place=device or offload, "
            "or teacher_dtype=int8 or bfloat16"
        )


def _cached(
    config: Config, pruned: Path, divergence: Divergence, inside: IntermediateWeights | None
) -> Teaching:
    """The teacher's logits lie on disk."""
    settings, where = config.distill, "distill.teacher_logits=cache"
    cache = TeacherLogits(Workspace(workspace_of(config)).logits)
    if divergence.name != "forward_kl":
        raise ValueError(f"{where}: gives forward_kl, found distill.divergence={divergence.name}")
    if settings.live_teacher is not None:
        raise ValueError(f"{where}: stays what it is, and distill.live_teacher changes; use online")
    if inside is not None:
        raise ValueError(f"{where}: holds no hidden states, which distill.intermediate.terms needs")
    refuse_phases(config)
    _check_cache(config, where)
    ours = read_config(pruned)["vocab_size"]
    vocabulary = None if ours == cache.facts["vocabulary"] else cache.facts["vocabulary"]

    def callbacks() -> list[Any]:
        from nemo_minitron.losses.fused_linear_loss import LossWeights
        from nemo_minitron.plugin.knowledge_distillation import CachedDistillation

        weights = LossWeights(settings.kl, settings.ce, divergence)
        return [CachedDistillation(cache, weights, settings.chunk_tokens, vocabulary)]

    def wrap_samples(samples: Any, validation: Any) -> tuple[Any, Any]:
        """The samples with their rows in the cache, refused where these are of others."""
        from nemo_minitron.training.sampler import Numbered

        if sample_fingerprint(samples) != cache.facts["samples"]:
            raise ValueError(
                f"{where}: made for other samples ({cache.facts['rows']:,}; this training reads "
                f"{len(samples):,}); run 'minitron logits' again, with the same data.train.samples if on "
                "fewer ranks"
            )
        return Numbered(samples), Numbered(validation, cache.facts["validation"])

    return callbacks, wrap_samples


def _check_cache(config: Config, where: str) -> None:
    """Refuses logits that were made otherwise than the configuration says now.

    Raises:
        ValueError: they were.
    """
    manifest = read_manifest(Workspace(workspace_of(config)).logits)
    assert manifest is not None
    again = "run 'minitron logits' again"
    for name, value in asked_for(config).items():
        made = manifest.config.get(name)
        if name == "train":  # how many samples: seen of the samples themselves
            made, value = [
                {key: each[key] for key in each if key != "samples"}
                for each in (made if isinstance(made, dict) else {}, value)
            ]
        if made != value:
            raise ValueError(f"{where}: made with {name} {made}, found {value}; {again}")
    inputs = training_inputs(config)
    with contextlib.suppress(ValueError, OSError):  # a teacher that is gone is not needed any more
        inputs.insert(0, distillation_teacher(config)[1])
    made_from = {item.fingerprint for item in manifest.inputs}
    for item in inputs:
        if item.fingerprint not in made_from:
            raise ValueError(f"{where}: made from something else than {item.path}; {again}")


def _divergence(settings: DistillConfig) -> Divergence:
    try:
        return Divergence(settings.divergence, settings.temperature, settings.beta, settings.top_k)
    except ValueError as error:
        raise ValueError(f"distill.{error}") from error


def _intermediate(settings: IntermediateConfig) -> IntermediateWeights | None:
    """The losses on hidden states, where there are some."""
    if not settings.terms:
        return None
    where = "distill.intermediate"
    pairs = []
    for text in settings.layers:
        pair = re.fullmatch(r"\s*(-?\d+)\s*:\s*(-?\d+)\s*", text)
        if pair is None:
            raise ValueError(
                f"{where}.layers: expected TEACHER:STUDENT, as in -3:-3, found {text!r}"
            )
        pairs.append((int(pair[1]), int(pair[2])))
    try:
        return IntermediateWeights(
            tuple(settings.terms),
            settings.distance,
            tuple(pairs),
            settings.relation_heads,
            settings.alpha,
        )
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _kept(config: Config) -> Any:
    """The teacher's channel that each channel of the student was; None where none was cut."""
    keep = read_plan(Workspace(workspace_of(config)).plan).keep
    return keep["hidden"] if "hidden" in keep else None
