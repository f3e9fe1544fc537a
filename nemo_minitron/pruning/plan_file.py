"""The plan: which units stay. ``plan.json`` for people, ``keep.safetensors`` for the machine."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from nemo_minitron.families import Architecture
from nemo_minitron.pruning.cost import Size, model_size
from nemo_minitron.pruning.select import Keep
from nemo_minitron.pruning.slice import Cut
from nemo_minitron.workspace.manifest import write_json

FILE = "plan.json"
KEEP = "keep.safetensors"


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
    """

    model_type: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    layers_kept: tuple[int, ...]
    layers_dropped: tuple[int, ...]
    cost_before: Size
    cost_after: Size
    keep: Keep


def make_plan(model: Architecture, keep: Keep, layers_kept: tuple[int, ...]) -> Plan:
    """Computes the model's cost before and after a cut."""
    before, pruned = model.sizes, Cut(model, keep, layers_kept).result
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
    )


def write_plan(folder: Path, plan: Plan) -> None:
    """Writes ``plan.json`` and ``keep.safetensors``."""
    readable = asdict(plan)
    readable["keep"] = {axis: f"{KEEP}: {list(index.shape)}" for axis, index in plan.keep.items()}
    ratio = plan.cost_after.parameters / plan.cost_before.parameters
    write_json(folder / FILE, {**readable, "parameters_kept": round(ratio, 6)})
    save_file({axis: index.contiguous() for axis, index in plan.keep.items()}, folder / KEEP)


def read_plan(folder: Path) -> Plan:
    """Reads what ``write_plan`` wrote."""
    raw = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return Plan(
        model_type=raw["model_type"],
        before=raw["before"],
        after=raw["after"],
        layers_kept=tuple(raw["layers_kept"]),
        layers_dropped=tuple(raw["layers_dropped"]),
        cost_before=Size(**raw["cost_before"]),
        cost_after=Size(**raw["cost_after"]),
        keep=load_file(folder / KEEP),
    )
