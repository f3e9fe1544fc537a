"""The plan: which units stay. ``plan.json`` for people, ``keep.safetensors`` for the machine."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from safetensors.torch import save_file

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.families import CHOSEN_EXPERTS, Architecture, families
from nemo_minitron.pruning.cost import Size, model_size
from nemo_minitron.pruning.head_merge import HEADS, MERGED, HeadMerge, check_merge
from nemo_minitron.pruning.select import Keep
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.pruning.vocabulary import Vocabulary
from nemo_minitron.security.plain_text import plain
from nemo_minitron.workspace.artifacts import check_file
from nemo_minitron.workspace.manifest import write_json
from nemo_minitron.workspace.tensor_file import read_tensors
from nemo_minitron.workspace.typed_json import read_json, remedy

FILE = "plan.json"
KEEP = "keep.safetensors"
_MERGED = "heads.merged_into"
"""In ``keep.safetensors``: ``HeadMerge.into_LU``."""


class _Written(TypedDict):
    model_type: str
    before: dict[str, int]
    after: dict[str, int]
    layers_kept: tuple[int, ...]
    layers_dropped: tuple[int, ...]
    cost_before: Size
    cost_after: Size
    mtp: NotRequired[str]
    mtp_kept: NotRequired[bool]
    vocabulary: NotRequired[Vocabulary]
    head_merge: NotRequired[str]


@dataclass(frozen=True)
class Plan:
    """A cut that has been decided.

    Attributes:
        model_type: family it was made for.
        before, after: axis sizes of source and result.
        layers_kept: 0-based source layers that stay.
        layers_dropped: those that go.
        cost_before, cost_after: parameters, FLOPs, KV bytes.
        keep: kept units of every axis that shrinks.
        mtp: what becomes of prediction layers (MTP), in a sentence; empty where the model has none.
        vocabulary: how the kept entries of the vocabulary were chosen; None: nobody asked for fewer.
        merge: what query heads that go leave in those that stay; None: nothing.
        mtp_kept: whether the export has prediction layers.
    """

    model_type: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    layers_kept: tuple[int, ...]
    layers_dropped: tuple[int, ...]
    cost_before: Size
    cost_after: Size
    keep: Keep
    mtp: str = ""
    vocabulary: Vocabulary | None = None
    merge: HeadMerge | None = None
    mtp_kept: bool = False

    @property
    def merged_heads(self) -> str:
        """What became of query heads that went, in a sentence; empty where they left nothing."""
        return (
            ""
            if self.merge is None
            else f"{MERGED[self.merge.how]} (plan.head_merge={self.merge.how})"
        )


def mtp_note(checkpoint: Checkpoint, keep: bool = False) -> str:
    """What becomes of a checkpoint's prediction layers, in a sentence; empty where it has none."""
    names = list(checkpoint.predictions)
    if not names:
        return ""
    which = f"{len(names)} tensors of multi-token prediction layers, as {plain(names[0], 120)}, are"
    if not keep:
        return f"{which} left out (plan.mtp=drop)"
    return (
        f"{which} cut along by their own weights (plan.mtp=keep): they are not counted among the parameters, "
        "nor trained, so that fewer of the tokens that they draft are accepted"
    )


def cut_of(plan: Plan, source: Architecture) -> Cut:
    """The cut of a model that a plan describes."""
    return Cut(source, plan.keep, plan.layers_kept, plan.after.get(CHOSEN_EXPERTS), plan.merge)


def make_plan(
    model: Architecture,
    keep: Keep,
    layers_kept: tuple[int, ...],
    mtp: str = "",
    experts_per_token: int | None = None,
) -> Plan:
    """Computes the model's cost before and after a cut."""
    before, pruned = model.sizes, Cut(model, keep, layers_kept, experts_per_token).result
    dropped = tuple(layer for layer in range(before["layers"]) if layer not in layers_kept)
    return Plan(
        model_type=model.family.model_type,
        before=before,
        after=pruned.sizes,
        layers_kept=layers_kept,
        layers_dropped=dropped,
        cost_before=model_size(model),
        cost_after=model_size(pruned),
        keep=keep,
        mtp=mtp,
    )


def write_plan(folder: Path, plan: Plan) -> None:
    """Writes ``plan.json`` and ``keep.safetensors``."""
    readable = asdict(plan)
    readable["keep"] = {axis: f"{KEEP}: {list(index.shape)}" for axis, index in plan.keep.items()}
    if not plan.mtp:
        del readable["mtp"]
    if not plan.mtp_kept:
        del readable["mtp_kept"]
    if plan.vocabulary is None:
        del readable["vocabulary"]
    del readable["merge"]
    if plan.merge is not None:
        readable["head_merge"] = plan.merge.how
    ratio = plan.cost_after.parameters / plan.cost_before.parameters
    write_json(folder / FILE, {**readable, "parameters_kept": round(ratio, 6)})
    merged = {} if plan.merge is None else {_MERGED: plan.merge.into_LU}
    stored = {**plan.keep, **merged}
    save_file({name: index.contiguous() for name, index in stored.items()}, folder / KEEP)


def read_plan(folder: Path) -> Plan:
    """Reads what ``write_plan`` wrote.

    Raises:
        ValueError: a file is missing, damaged, or no longer what the plan's manifest says; or the
            two do not agree with each other.
    """
    for name in (FILE, KEEP):
        check_file(folder / name)
    raw = read_json(folder / FILE, _Written)
    keep = read_tensors(folder / KEEP)
    how = raw.pop("head_merge", None)
    plan = Plan(keep=keep, **{k: raw[k] for k in _Written.__annotations__ if k in raw})
    try:
        _check_layers(plan)
    except ValueError as error:
        path = folder / FILE
        raise ValueError(f"{path}: damaged: {error}; {remedy(path)}") from None
    try:
        if how is not None:
            plan = replace(plan, merge=_merge(plan, how))
        _check_keep(plan)
    except ValueError as error:
        path = folder / KEEP
        raise ValueError(f"{path}: damaged: {error}; {remedy(path)}") from None
    return plan


def _merge(plan: Plan, how: str) -> HeadMerge:
    """Takes the heads' merge out of the kept units.

    Raises:
        ValueError: there is none, or none that fits the heads that stay.
    """
    if how not in MERGED or _MERGED not in plan.keep or HEADS not in plan.keep:
        raise ValueError(f"{_MERGED}: expected what {FILE} names ({plain(how, 40)}), found none")
    merge = HeadMerge(how, plan.keep.pop(_MERGED))
    family = families().get(plan.model_type)
    group = None if family is None else family.axes[HEADS].within
    heads = plan.before[HEADS]
    try:
        check_merge(merge, plan.keep[HEADS], heads, heads // plan.before[group] if group else heads)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{_MERGED}: {error}") from None
    return merge


def is_for(plan: Plan, architecture: Architecture) -> bool:
    """Whether a plan was made for a model of these sizes."""
    family, sizes = architecture.family, architecture.sizes
    return plan.before == sizes and all(
        tuple(index.shape[:-1]) == tuple(sizes[owner] for owner in family.ranked_per(axis))
        for axis, index in plan.keep.items()
    )


def _check_layers(plan: Plan) -> None:
    """Refuses sizes and layers that are none.

    Raises:
        ValueError: they are.
    """
    before, after, kept = plan.before, plan.after, plan.layers_kept
    if before.keys() != after.keys() or "layers" not in before:
        raise ValueError("expected the same axes before and after, layers among them")
    for axis, size in after.items():
        if not 1 <= size <= before[axis]:
            raise ValueError(
                f"after: {plain(axis, 40)}: expected 1 to {before[axis]}, found {size}"
            )
    if list(kept) != sorted({*kept} & {*range(before["layers"])}):
        raise ValueError(
            f"layers_kept: expected layers of {before['layers']}, ascending, each once"
        )
    if len(kept) != after["layers"]:
        raise ValueError(f"layers_kept: expected {after['layers']} layers, found {len(kept)}")
    if sorted((*kept, *plan.layers_dropped)) != list(range(before["layers"])):
        raise ValueError("layers_dropped: expected all layers that are not in layers_kept")


def _check_keep(plan: Plan) -> None:
    """Refuses units that are not those of the sizes.

    Raises:
        ValueError: they are not.
    """
    cut = {axis for axis in plan.before if plan.after[axis] != plan.before[axis]}
    cut -= {"layers", CHOSEN_EXPERTS}
    family = families().get(plan.model_type)
    if family is not None:  # what follows others may be in no tensor
        cut -= {name for name, axis in family.axes.items() if axis.follows is not None}
    for axis in sorted(cut - plan.keep.keys()):
        raise ValueError(f"{plain(axis, 40)}: expected {plan.after[axis]} units, found none")
    for axis, index in plan.keep.items():
        name = plain(axis, 40)
        if axis not in plan.before or axis == "layers":
            raise ValueError(f"{name}: no axis of the plan has this name")
        if index.dtype != torch.int64 or not 1 <= index.dim() <= 3:
            raise ValueError(
                f"{name}: expected whole numbers, found {index.dtype} in another shape"
            )
        if index.shape[-1] != plan.after[axis]:
            raise ValueError(
                f"{name}: expected {plan.after[axis]} units, found {index.shape[-1]} ({FILE})"
            )
        rising = bool((index.diff(dim=-1) > 0).all())
        if not index.numel() or not rising or index.min() < 0 or index.max() >= plan.before[axis]:
            raise ValueError(
                f"{name}: expected units from 0 to {plan.before[axis] - 1}, ascending, each once"
            )
