"""Proves or refuses a family table on real, tiny models.

Every weight of the models, norms, biases and router buffers included, is random at unit scale: at
their usual constants a wrong row would survive.
"""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.checkpoint import SINGLE, Checkpoint, open_checkpoint
from nemo_minitron.families import Family, check_sizes, family_for
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.prediction_proof import (
    drafted,
    drafting,
    drafts_truly,
    reordered,
    runs_predictions,
    with_predictions,
    write_both,
)
from nemo_minitron.proofs.tiny_models import (
    dead_copy,
    dying,
    in_memory_names,
    living,
    permutation,
    tiny_model,
)
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.select import Keep, complete_targets, score_shape, select_units
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.stream import write_pruned
from nemo_minitron.scoring.importance import random_scores

PROOFS = ("permutation", "dead units", "strict load", "generate")
TOGETHER = "all together"
PREDICTIONS, STACKED = "prediction layers", "experts in one tensor"
TOLERANCE = 1e-5
"""Largest difference of logits that counts as equal, relative to the largest logit."""


@dataclass(frozen=True)
class Finding:
    """Outcome of one proof of one axis: whether it holds, or why it does not apply."""

    axis: str
    proof: str
    holds: bool
    note: str = ""


def logits_of(folder: Path) -> Tensor:
    """Logits of a saved model after a strict load, float32, shape [2, 12, vocabulary]."""
    model = load_model(folder, torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(_tokens(model.config.vocab_size)).logits
    return logits


def _tokens(vocabulary: int) -> Tensor:
    return torch.randint(2, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))


def equal(before: Tensor, after: Tensor) -> bool:
    """Whether logits are equal up to rounding."""
    return bool((before - after).abs().max() <= TOLERANCE * before.abs().max())


def prove(family: Family, changes: Mapping[str, Any]) -> Iterator[Finding]:
    """Proves a table on a tiny model.

    Args:
        family: the table.
        changes: config values beyond the sizes, one of the table's ``proofs``.

    Yields:
        One finding per axis and proof.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = tiny_model(family, changes, work / "source")
        opened = open_checkpoint(source)
        family = family_for(family, opened.config)
        checkpoint = described(opened, family)
        axes = checkpoint.architecture.prunable
        yield from permutations(checkpoint, [axis for axis in axes if axis != "layers"], work)
        yield from dead_units(checkpoint, axes, work)
        for axis in [*axes, TOGETHER]:
            try:
                yield from _half(checkpoint, axis, axes, work)
            except (ValueError, RuntimeError) as error:  # a wrong table: the result is no model
                yield from (Finding(axis, proof, False, str(error)) for proof in PROOFS[2:])
        if family.stacked:
            yield from _stacked(checkpoint, axes, work)
        if family.mtp_block and runs_predictions():
            yield from predictions(checkpoint, work)


def _stacked(checkpoint: Checkpoint, axes: Sequence[str], work: Path) -> Iterator[Finding]:
    """Proves the rows of tensors that a checkpoint may have in the place of others."""
    other = open_checkpoint(in_memory_names(checkpoint, work / "stacked"))
    before = logits_of(checkpoint.folder)
    moved = permutations(
        other, [a for a in axes if a != "layers"], work, alone=False, before=before
    )
    for finding in itertools.chain(moved, _half(other, TOGETHER, axes, work)):
        yield replace(finding, axis=STACKED)


def predictions(checkpoint: Checkpoint, work: Path) -> Iterator[Finding]:
    """Proves the rows of prediction layers (MTP): what they draft, not the text, depends on them."""
    try:
        with_predictions(checkpoint.folder, work / "behind")
        source = described(open_checkpoint(work / "behind"), checkpoint.family)
        before, after = drafted(source.folder), drafted(reordered(source, work / "moved"))
        yield Finding(PREDICTIONS, "permutation", equal(before, after))
        axes = source.architecture.prunable
        keep, layers = _halves(
            source, halved(source.family, source.architecture.sizes, TOGETHER, axes)
        )
        half = write_both(source, keep, layers, work / "half")
        fine = len(open_checkpoint(half).predictions) > 0 and bool(drafted(half).isfinite().all())
        yield Finding(PREDICTIONS, "strict load", fine)
        if not drafting(half)._is_stateful:  # of others transformers drafts nothing
            yield Finding(PREDICTIONS, "generate", drafts_truly(half))
    except (ValueError, RuntimeError, AssertionError) as error:
        yield from (
            Finding(PREDICTIONS, p, False, str(error)) for p in ("permutation", "strict load")
        )


def _halves(checkpoint: Checkpoint, targets: Mapping[str, int]) -> tuple[Keep, list[int]]:
    """Random units, so many of each axis as the targets say, and every other layer where they say fewer."""
    family, sizes = checkpoint.family, checkpoint.architecture.sizes
    scores = {
        name: random_scores(score_shape(family, sizes, name), seed)
        for seed, name in enumerate(checkpoint.architecture.prunable)
    }
    keep = select_units(family, scores, sizes, {n: t for n, t in targets.items() if n != "layers"})
    layers = list(range(sizes["layers"]))
    return keep, layers[1::2] if targets["layers"] < sizes["layers"] else layers


def described(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """A checkpoint as another table of its family describes it."""
    return replace(checkpoint, architecture=replace(checkpoint.architecture, family=family))


def permutations(
    checkpoint: Checkpoint,
    axes: Sequence[str],
    work: Path,
    alone: bool = True,
    before: Tensor | None = None,
) -> Iterator[Finding]:
    """Permutes axes, in groups and all together: the logits must stay as they were, ``before``.

    Of any two axes a group has one without the other, so that no mistake about one hides behind the order
    of the other. Where a group fails, each axis is moved alone, to name it.
    """
    if before is None:
        before = logits_of(checkpoint.folder)

    def holds(moved: Sequence[str]) -> bool:
        keep = permutation(checkpoint.architecture, moved)
        with tempfile.TemporaryDirectory(dir=work) as target:
            return equal(before, logits_of(_cut(checkpoint, keep, None, Path(target))))

    fine = not alone or all(map(holds, _groups(axes)))
    for axis in axes if alone else ():
        yield Finding(axis, "permutation", fine or holds([axis]))
    yield Finding(TOGETHER, "permutation", fine and holds(axes))


def _groups(axes: Sequence[str]) -> list[list[str]]:
    """By the binary digits of an axis' number, from 1: each axis is in a group, and no two in the same."""
    digits = range(len(axes).bit_length())
    return [[axis for n, axis in enumerate(axes, 1) if n >> digit & 1] for digit in digits]


def _cut(checkpoint: Checkpoint, keep: Keep, layers: Sequence[int] | None, target: Path) -> Path:
    every = range(checkpoint.architecture.sizes["layers"])
    cut = Cut(checkpoint.architecture, keep, tuple(every if layers is None else layers))
    write_pruned(checkpoint, [(target, cut)], 10**9)
    return target


def dead_units(checkpoint: Checkpoint, axes: Sequence[str], work: Path) -> Iterator[Finding]:
    """Removes units that were dead, in groups of axes: the logits must stay as they were.

    Groups are those of ``permutations``. Where one fails, each axis is tried alone, to name it; where none of
    them fails alone, the finding is about all together.
    """
    reasons = {axis: _why_not(checkpoint, axis) for axis in axes}
    tried = [axis for axis in axes if reasons[axis] is None]

    def failure(chosen: Sequence[str]) -> str | None:
        with tempfile.TemporaryDirectory(dir=work) as name:
            try:
                return None if _outlived(checkpoint, chosen, Path(name)) else ""
            except (ValueError, RuntimeError) as error:
                return str(error)

    wrong = next((said for said in map(failure, _groups(tried)) if said is not None), None)
    named = False
    for axis, reason in reasons.items():
        failed = None if wrong is None or reason is not None else failure([axis])
        named = named or failed is not None
        yield Finding(axis, "dead units", failed is None, reason or failed or "")
    if wrong is not None and not named:
        yield Finding(TOGETHER, "dead units", False, wrong)


def _why_not(checkpoint: Checkpoint, axis: str) -> str | None:
    """Why units of an axis cannot be removed alone without a change of the logits."""
    model, of = checkpoint.architecture, checkpoint.family.axes[axis]
    if of.within is not None and model.sizes[of.within] == model.sizes[axis]:
        return f"one in each of {of.within}: cut together"
    if axis == "hidden":
        return "norm statistics change"
    if of.inexact is not None:
        return of.inexact
    try:
        keep, layers = living(model, dying(model, [axis]))
        check_sizes(model.family, Cut(model, keep, tuple(layers)).after, axis)
    except ValueError as error:
        return f"cannot be cut alone: {error}"
    return None


def _outlived(checkpoint: Checkpoint, axes: Sequence[str], work: Path) -> bool:
    """Whether a model computes the same without the units that were dead in it."""
    dead = dying(checkpoint.architecture, axes)
    keep, layers = living(checkpoint.architecture, dead)
    folder = dead_copy(checkpoint, dead, "experts" in axes, work / "dead")
    copy = described(open_checkpoint(folder), checkpoint.family)
    (work / "cut").mkdir()
    return equal(logits_of(folder), logits_of(_cut(copy, keep, layers, work / "cut")))


def halved(
    family: Family, sizes: Mapping[str, int], axis: str, axes: Sequence[str]
) -> dict[str, int]:
    """Targets with one axis halved, and as few other axes as the architecture's rules require.

    All together: all but as few as these rules require.
    """
    others = [name for name in axes if name not in (axis, "layers")]
    for some in itertools.chain.from_iterable(itertools.combinations(others, n) for n in range(3)):
        asked = [name for name in axes if name not in some] if axis == TOGETHER else [axis, *some]
        half = {name: sizes[name] // 2 for name in asked if family.axes[name].follows is None}
        try:
            targets = complete_targets(family, sizes, half)
            check_sizes(family, targets, axis)
        except ValueError:
            continue
        return targets
    raise ValueError(f"{family.model_type}: no way to halve {axis}")


def _half(checkpoint: Checkpoint, axis: str, axes: Sequence[str], work: Path) -> Iterator[Finding]:
    """Cuts an axis to half: loads strictly, has the predicted size, generates with a cache.

    Saved and loaded again, and with the same bytes, is the model with all axes cut, and one whose axis
    cannot be cut with all.
    """
    family, sizes = checkpoint.family, checkpoint.architecture.sizes
    targets = halved(family, sizes, axis, axes)
    keep, layers = _halves(checkpoint, targets)
    others = [
        n
        for n in axes
        if targets[n] < sizes[n]
        and n not in (axis, family.axes[axis].within if axis in axes else "")
    ]
    note = "with " + ", ".join(others) if others and axis != TOGETHER else ""
    with tempfile.TemporaryDirectory(dir=work) as name:
        target = Path(name) / "half"
        target.mkdir()
        _cut(checkpoint, keep, layers, target)
        model = load_model(target, torch.float32)
        fine = _stored(target) == model_size(open_checkpoint(target).architecture).parameters
        if axis != "layers" and axis != TOGETHER:
            predicted = checkpoint.architecture.resized(targets)
            fine &= _stored(target) == model_size(predicted).parameters
        fine &= _ties_kept(checkpoint, model)
        if axis == TOGETHER or halved(family, sizes, TOGETHER, axes)[axis] == sizes[axis]:
            fine &= _round_trips(model, Path(name))
        yield Finding(axis, "strict load", fine, note)
        yield Finding(axis, "generate", generates(model), note)


def _stored(folder: Path) -> int:
    return sum(
        torch.Size(entry.shape).numel() for entry in open_checkpoint(folder).entries.values()
    )


def _ties_kept(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether head and embeddings are one tensor in the cut model if and only if they were."""
    tied = not any("lm_head" in name for name in checkpoint.entries)
    one = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return tied == one


def _round_trips(model: Any, work: Path) -> bool:
    """Whether save, load, save gives the same bytes."""
    model.save_pretrained(work / "first")
    load_model(work / "first").save_pretrained(work / "second")
    files = sorted(path.name for path in (work / "first").iterdir())
    assert SINGLE in files, files
    return all(
        (work / "first" / n).read_bytes() == (work / "second" / n).read_bytes() for n in files
    )


def generates(model: Any, length: int = 6) -> bool:
    """Whether greedy generation with the KV cache picks what a full forward pass picks."""
    tokens = _tokens(model.config.vocab_size)[:1]
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    with torch.inference_mode():
        out = model.generate(
            tokens,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        # one pass over all is a pass over each beginning of it: no position sees a later one
        logits = model(out[:, :-1], use_cache=False).logits[0, tokens.shape[1] - 1 :].clone()
        logits[:, ends] = -torch.inf  # min_new_tokens forbids the end tokens
    picked = logits.gather(1, out[0, tokens.shape[1] :, None])[:, 0]
    largest = logits.masked_fill(logits.isinf(), 0).abs().amax(1)
    close = logits.amax(1) - picked <= TOLERANCE * largest
    return bool(close.all()) and out.shape[1] == tokens.shape[1] + length


Row = tuple[str, ...]
COLUMNS = ("family", "axis", *PROOFS)


def proof_table(chosen: Mapping[str, Family]) -> tuple[Row, tuple[Row, ...], int]:
    """Proves families under all of their configs.

    Args:
        chosen: families by ``model_type``.

    Returns:
        Column titles, a row per family and axis, and how many cells failed. A cell says ``yes``,
        ``FAILS``, why the proof does not apply, or that the installed transformers does not have
        the architecture.
    """
    rows: list[Row] = []
    for model_type, family in chosen.items():
        try:
            findings = [finding for changes in family.proofs for finding in prove(family, changes)]
        except ModuleNotFoundError as error:
            rows.append((model_type, "all", *[str(error)] * len(PROOFS)))
            continue
        rows += tabulate(model_type, family, findings)
    return COLUMNS, tuple(rows), sum("FAILS" in row for row in rows)


def tabulate(model_type: str, family: Family, findings: Sequence[Finding]) -> list[Row]:
    """A row per axis, in the words of ``proof_table``."""
    cells: dict[tuple[str, str], set[str]] = {}
    for finding in findings:
        reason = finding.note if finding.holds and finding.proof == "dead units" else ""
        text = (reason or "yes") if finding.holds else "FAILS"
        cells.setdefault((finding.axis, finding.proof), set()).add(text)
    rows = []
    more = [name for name in (STACKED, PREDICTIONS) if any(axis == name for axis, _ in cells)]
    for axis in [*family.prunable, TOGETHER, *more]:
        found = [cells.get((axis, proof), {"–"}) for proof in PROOFS]
        texts = (
            "FAILS" if "FAILS" in c else "yes" if "yes" in c else "; ".join(sorted(c))
            for c in found
        )
        rows.append((model_type, axis, *texts))
    return rows
