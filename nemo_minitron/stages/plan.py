"""plan: from scores and target sizes to the units that stay."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.gguf_weights import is_gguf
from nemo_minitron.checkpoints.hf_config import both_spellings
from nemo_minitron.checkpoints.side_files import copy_side_files, tokenizer_fingerprint
from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.data.mixtures import calibration_mixture, sampling, text_input
from nemo_minitron.families import CHOSEN_EXPERTS, VOCAB
from nemo_minitron.models.ranks import Ranks
from nemo_minitron.pruning.cost import alignment
from nemo_minitron.pruning.head_merge import HEADS, HeadMerge, merged_into
from nemo_minitron.pruning.plan_file import Plan, cut_of, make_plan, mtp_note, read_plan, write_plan
from nemo_minitron.pruning.select import Keep, select_units
from nemo_minitron.pruning.serving import check_serving, serving_notes
from nemo_minitron.pruning.slice import pattern_notes
from nemo_minitron.pruning.slice_predictions import keeps_predictions
from nemo_minitron.pruning.target_sizes import (
    cuts_vocabulary,
    explicit_targets,
    needs_scores,
    target_sizes,
)
from nemo_minitron.pruning.tokenizer_cut import cut_tokenizer, ids_named, new_ids
from nemo_minitron.pruning.tokenizer_file import TokenizerFile
from nemo_minitron.pruning.vocabulary import Vocabulary, choose
from nemo_minitron.scoring.routing import kept_notes
from nemo_minitron.scoring.scores_file import (
    ROUTING,
    Scores,
    check_scores,
    read_routing,
    read_scores,
)
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.inputs import teacher_folder
from nemo_minitron.stages.layer_choice import layers_of_plan
from nemo_minitron.stages.recipe import Recipe, Summary
from nemo_minitron.workspace.artifacts import input_artifact
from nemo_minitron.workspace.layout import Workspace


def recipe(config: Config) -> Recipe:
    """Decides which units stay.

    Raises:
        ValueError: a target is larger than the source, breaks a rule of the family, or nothing is
            asked for.
    """
    workspace = Workspace(workspace_of(config))
    source, teacher = teacher_folder(config)
    checkpoint = open_checkpoint(source)
    sizes = checkpoint.architecture.sizes
    targets = target_sizes(checkpoint.architecture, config.plan)
    keeps = keeps_predictions(checkpoint, config.plan.mtp)
    inputs = [teacher]
    if needs_scores(config.plan):
        inputs.append(input_artifact(workspace.root, "scores", "score"))
    tokenizer = _tokenizer(config, checkpoint)
    if tokenizer is not None:
        inputs += [text_input(text) for text, _ in calibration_mixture(config)]

    def build(_state: Path, temporary: Path, _ranks: Ranks) -> None:
        from nemo_minitron.models.config_trial import check_config_loads

        scores = _scores(config, checkpoint)
        layers = layers_of_plan(config, sizes, scores)
        checkpoint.architecture.check_layers(layers, "plan")
        widths = {axis: size for axis, size in targets.items() if axis != "layers"}
        keep = select_units(checkpoint.family, scores.ranking, sizes, widths)
        kept, vocabulary = _vocabulary(config, checkpoint, tokenizer)
        made = make_plan(
            checkpoint.architecture, keep | kept, tuple(layers), mtp_note(checkpoint, keeps),
            targets.get(CHOSEN_EXPERTS),
        )  # fmt: skip
        result = cut_of(made, checkpoint.architecture).result
        check_serving(checkpoint.architecture, made.after, config.plan.serve, "plan.serve")
        check_config_loads(both_spellings(result.config), "plan")
        merge = _merge(config.plan.head_merge, checkpoint, scores, keep)
        write_plan(temporary, replace(made, vocabulary=vocabulary, merge=merge, mtp_kept=keeps))

    settings = explicit_targets(config.plan) | _reading(config, source)
    if settings.get("layer_choice") == "contiguous":
        settings["depth"] = config.score.depth
    folder = workspace.plan

    def summary() -> Summary:
        plan = read_plan(folder)
        of = pattern_notes(checkpoint.architecture, plan.layers_kept)
        of += serving_notes(checkpoint.architecture, plan.after, config.plan.serve)
        of += _kept_experts(workspace.scores, plan)
        found = _summary(plan)
        return replace(found, notes=(*found.notes, *of))

    return Recipe(folder, "plan", settings, inputs, build, summary)


def _scores(config: Config, checkpoint: Checkpoint) -> Scores:
    """The scores that the plan needs; empty where it needs none."""
    if not needs_scores(config.plan):
        return Scores({})
    folder = Workspace(workspace_of(config)).scores
    scores = read_scores(folder)
    check_scores(folder, scores, checkpoint.family, checkpoint.architecture.sizes)
    return scores


def _merge(how: str, checkpoint: Checkpoint, scores: Scores, keep: Keep) -> HeadMerge | None:
    """What the query heads that go leave in those that stay."""
    if how == "none":
        return None
    group = checkpoint.family.axes[HEADS].within
    assert group is not None, "the target sizes were checked"
    groups = checkpoint.architecture.sizes[group]
    return HeadMerge(how, merged_into(scores.ranking[HEADS], keep, group, groups))


def _kept_experts(scores: Path, plan: Plan) -> list[str]:
    """What the kept experts mean to each text of the calibration mixture, where the scores say."""
    if "experts" not in plan.keep or not (scores / ROUTING).is_file():
        return []
    texts, by_text = read_routing(scores)
    keep_LK = plan.keep["experts"]
    fits = by_text.shape[1:] == (len(keep_LK), plan.before["experts"])
    return kept_notes(texts, by_text, keep_LK) if fits else []


def _tokenizer(config: Config, checkpoint: Checkpoint) -> TokenizerFile | None:
    """The tokenizer of a model whose vocabulary is cut; None: it is not.

    Raises:
        ValueError: it cannot be cut, or the model's vocabulary cannot.
    """
    if not cuts_vocabulary(config.plan):
        return None
    wanted, found = config.plan.vocab, checkpoint.architecture.sizes[VOCAB]
    if VOCAB not in checkpoint.family.resizable:
        raise ValueError(
            f"plan.vocab: the table of {checkpoint.family.model_type} says that its vocabulary is fixed"
        )
    if wanted is not None and wanted > found:
        raise ValueError(f"plan.vocab: expected 1 to {found} (the source's size), found {wanted}")
    if config.export.gguf and is_gguf(checkpoint.folder):
        raise ValueError(
            "export.gguf: the tokenizer of a model that came as GGUF goes out as it came in, and plan.vocab "
            "cuts it; choose one of them"
        )
    return TokenizerFile(checkpoint.folder)


def _reading(config: Config, folder: Path) -> dict[str, Any]:
    """How the text is read that decides on the vocabulary, where it is cut."""
    if not cuts_vocabulary(config.plan):
        return {}
    own = config.data.calibration
    read = {**sampling(own), "packing": own.packing, "weights": own.weights}
    return {"calibration": read, "tokenizer": tokenizer_fingerprint(folder)}


def _vocabulary(
    config: Config, checkpoint: Checkpoint, tokenizer: TokenizerFile | None
) -> tuple[Keep, Vocabulary | None]:
    """The entries that stay, by their counts on the calibration text; nothing where none goes."""
    if tokenizer is None:
        return {}, None
    from nemo_minitron.data.token_counts import calibration_counts, template_ids
    from nemo_minitron.models.causal_lm import load_tokenizer

    rows, folder = checkpoint.architecture.sizes[VOCAB], checkpoint.folder
    loaded = load_tokenizer(folder)
    around = {} if checkpoint.around is None else checkpoint.around.config
    named = ids_named(folder, checkpoint.config, around)
    construction = tokenizer.construction(rows)
    needed = (
        construction.needed | template_ids(loaded) | named | {*loaded.get_added_vocab().values()}
    )
    counts_V = calibration_counts(config, loaded, rows)
    size, coverage = config.plan.vocab, config.plan.vocab_coverage
    kept_V, made = choose(counts_V, replace(construction, needed=needed), size, coverage)
    if len(kept_V) == rows:
        return {}, made
    _check_tokenizer(folder, kept_V, loaded.get_vocab())
    return {VOCAB: kept_V}, made


def _check_tokenizer(folder: Path, kept_V: Tensor, before: Mapping[str, int]) -> None:
    """Tries the smaller tokenizer: whoever loads it adds tokens of their own to some.

    Raises:
        ValueError: it does not load, or gives a token another id than the embedding has.
    """
    from nemo_minitron.models.causal_lm import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        copy_side_files(folder, Path(name))
        shutil.copy(folder / "config.json", name)  # may say of which class it is
        cut_tokenizer(Path(name), kept_V)
        found = load_tokenizer(Path(name), len(kept_V)).get_vocab()
    ids = new_ids(kept_V)
    expected = {token: ids[number] for token, number in before.items() if number in ids}
    for token in sorted(found.keys() | expected.keys()):
        if found.get(token) != expected.get(token):
            raise ValueError(
                f"plan.vocab: {folder}: the smaller tokenizer does not load as it was written: "
                f"{plain(token, 40)!r} should be {expected.get(token)}, found {found.get(token)}"
            )


def _summary(plan: Plan) -> Summary:
    rows = [(axis, f"{plan.before[axis]:,}", f"{plan.after[axis]:,}") for axis in plan.before]
    before, after = plan.cost_before, plan.cost_after
    for title, attribute in (
        ("parameters", "parameters"),
        ("without embeddings", "non_embedding"),
        ("active per token", "active"),
        (f"FLOPs per token at {before.context}", "flops_per_token"),
        ("KV-cache bytes per token", "kv_bytes_per_token"),
    ):
        rows.append((title, f"{getattr(before, attribute):,}", f"{getattr(after, attribute):,}"))
    share = after.parameters / before.parameters
    headline = f"{before.parameters:,} -> {after.parameters:,} parameters ({share:.1%})"
    if plan.layers_dropped:
        headline += f", layers {', '.join(map(str, plan.layers_dropped))} dropped"
    facts = {
        "before": asdict(before),
        "after": asdict(after),
        "layers_dropped": list(plan.layers_dropped),
    }
    notes = (*alignment(plan.before, plan.after), *([plan.mtp] if plan.mtp else []))
    if plan.merge is not None:
        facts["head_merge"], notes = (
            plan.merge.how,
            (*notes, f"inside each KV group {plan.merged_heads}"),
        )
    if plan.vocabulary is not None:
        facts["vocabulary"] = asdict(plan.vocabulary)
        notes = (*notes, plan.vocabulary.note())
    return Summary(headline, ("", "before", "after"), tuple(rows), facts, notes)
