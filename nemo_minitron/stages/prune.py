"""prune: a Hugging Face folder in, a smaller one out, one tensor at a time.

No framework, no model in memory.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from nemo_minitron.artifacts.build import make
from nemo_minitron.artifacts.checkpoint import (
    Checkpoint,
    both_spellings,
    copy_side_files,
    open_checkpoint,
    tensor_reader,
)
from nemo_minitron.artifacts.manifest import write_json
from nemo_minitron.artifacts.plan import read_plan
from nemo_minitron.artifacts.weights import Planned, write_weights
from nemo_minitron.artifacts.workspace import input_artifact
from nemo_minitron.core.cut import Cut, cut_config, cut_names, cut_tensor, layer_keep
from nemo_minitron.core.size import model_size
from nemo_minitron.families import axis_sizes, expected_tensors
from nemo_minitron.stages.config import Config
from nemo_minitron.stages.stage import Result, teacher_folder, workspace_of

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def run(config: Config) -> Result:
    """Cuts the teacher by the plan."""
    workspace = workspace_of(config)
    source, teacher = teacher_folder(config)
    inputs = [teacher, input_artifact(workspace, "plan", "plan")]

    def build(temporary: Path) -> dict[str, str]:
        plan = read_plan(workspace / "plan")
        checkpoint = open_checkpoint(source)
        cut = Cut(checkpoint.family, checkpoint.config, plan.keep, plan.layers_kept)
        return write_pruned(checkpoint, cut, temporary, config.prune.shard_size)

    made = make(workspace / "pruned", "pruned", asdict(config.prune), inputs, build)
    pruned = open_checkpoint(workspace / "pruned")
    size = model_size(pruned.family, pruned.config)
    return Result(
        "prune", workspace / "pruned", made, f"{size.parameters:,} parameters in {workspace / 'pruned'}"
    )


def write_pruned(checkpoint: Checkpoint, cut: Cut, folder: Path, shard_bytes: int) -> dict[str, str]:
    """Streams a checkpoint through a cut into a folder.

    Args:
        checkpoint: the source.
        cut: what to cut.
        folder: an existing, empty folder.
        shard_bytes: largest shard.

    Returns:
        File name to SHA-256 of the weight files.

    Raises:
        ValueError: the result would not be what its config.json says.
    """
    from rich.progress import Progress

    sizes = axis_sizes(cut.family, cut.config)
    read = tensor_reader(checkpoint)
    pruned_config = cut_config(cut)
    shapes = {name: shape for name, _, shape in expected_tensors(cut.family, pruned_config)}
    origin = {new: (old, row, layer) for new, old, row, layer in cut_names(cut, list(checkpoint.entries))}
    planned = [
        Planned(
            new,
            _TORCH[checkpoint.entries[old].dtype],
            shapes[new] if new in shapes else _shape(new, origin, cut),
        )
        for new, (old, _, _) in origin.items()
    ]

    def cut_one(new: str) -> Tensor:
        old, row, layer = origin[new]
        return cut_tensor(read(old), row, sizes, layer_keep(cut.family, cut.keep, layer))

    with Progress(transient=True) as progress:
        task = progress.add_task("pruning", total=sum(tensor.size for tensor in planned))
        hashes = write_weights(
            folder, planned, cut_one, shard_bytes, lambda size: progress.advance(task, size)
        )
    write_json(folder / "config.json", both_spellings(pruned_config))
    copy_side_files(checkpoint.folder, folder)
    open_checkpoint(folder)  # the result must satisfy the table as strictly as the source did
    return hashes


def _shape(new: str, origin: dict[str, tuple[str, object, int | None]], cut: Cut) -> tuple[int, ...]:
    """Shape of a tensor that its config does not ask for (a head stored beside tied embeddings)."""
    from nemo_minitron.families import find_row
    from nemo_minitron.families.grammar import row_shape

    found = find_row(cut.family, new)
    assert found is not None, origin[new]
    return row_shape(found[0].dims, axis_sizes(cut.family, cut_config(cut)))
