"""Scoring on a GPU: all axes and block influence against the plain forward pass without head, in one model's shape.

Random weights of SmolLM2-135M's shape in bf16. Memory traffic sets the floor: each tapped activation is read once more.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import Row, device_of, measure
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.data.calibration_samples import Samples
from nemo_minitron.models.causal_lm import (
    decoder_of,
    free,
    frozen,
    load_model,
    new_model,
    save_model,
    stored_config,
)
from nemo_minitron.scoring import hooks
from nemo_minitron.scoring.batch_size import fitting
from nemo_minitron.scoring.calibration_sums import CalibrationSums
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.pass_by_layer import streamed
from nemo_minitron.scoring.pass_in_memory import in_memory

SHAPE = {
    "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 512,
    "hidden_size": 72,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "head_dim": 8,
}
SAMPLES, POSITIONS = 512, 1024


def apart(one: CalibrationSums, other: CalibrationSums) -> float:
    """The largest relative difference of two passes' sums."""
    pairs = [(sums.squares, other.sums[key].squares) for key, sums in one.sums.items()]
    pairs += [(sums.total, other.depth[key].total) for key, sums in one.depth.items()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def with_eager_sums(run: Any) -> Any:
    """The same with PyTorch's operations in place of the kernels."""
    kept = hooks.kernels_for
    hooks.kernels_for = lambda _: None
    try:
        return run()
    finally:
        hooks.kernels_for = kept


def passes(checkpoint: Checkpoint, device: str, tiny: bool) -> list[Row]:
    """The rows of one model."""
    count, positions = (6, 32) if tiny else (SAMPLES, POSITIONS)
    generator = torch.Generator().manual_seed(0)
    samples = Samples(
        torch.randint(0, TINY["vocab_size"], (count, positions + 1), generator=generator)
    )
    model = load_model(checkpoint.folder, device=torch.device(device))
    size = 2
    if not tiny:
        size, line = fitting(model, checkpoint, samples, range(count), Measures())
        print(line, flush=True)
    rows: list[Row] = []

    def groups(size: int) -> list[list[int]]:
        return [list(range(i, min(i + size, count))) for i in range(0, count, size)]

    def plain(size: int) -> None:
        decoder = decoder_of(model, checkpoint.family)
        with frozen(model):
            for group in groups(size):
                decoder(**samples.batch(group).to(torch.device(device)).inputs())

    def add(
        what: str, run: Any, reference: float | None = None, repeats: int = 3, more: str = ""
    ) -> float:
        milliseconds, gib = measure(device, run, repeats)
        note = f"{1000 * count * positions / milliseconds:,.0f} tokens/s{more}"
        rows.append(Row(what, milliseconds, milliseconds / (reference or milliseconds), gib, note))
        print(f"{what}: {rows[-1].ratio:.2f}, {note}", flush=True)
        return milliseconds

    def score(size: int, measures: Measures = Measures()) -> CalibrationSums:  # noqa: B008 (frozen)
        return in_memory(model, checkpoint, samples, groups(size), measures)

    eager = with_eager_sums(lambda: score(size))
    difference = f", {apart(score(size), eager):.0e} from PyTorch's operations"
    for samples_at_once in dict.fromkeys((size, size if tiny else 8)):
        told = f"{samples_at_once} samples at once"
        base = add(f"forward without head, {told}", lambda n=samples_at_once: plain(n))
        add(f"score, {told}", lambda n=samples_at_once: score(n), base, more=difference)
        if samples_at_once != size:
            break
        kinds = {
            "widths alone": Measures(influence=()),
            "depth alone": Measures(()),
            "mean, l2, var": Measures(("mean", "l2", "var")),
        }
        for kind, measures in kinds.items():
            add(f"score {kind}, {told}", lambda m=measures: score(size, m), base)
        slow = f"score, PyTorch's operations, {told}"
        add(slow, lambda: with_eager_sums(lambda: score(size)), base, 2)
        first = base
    model = None
    free()

    def by_layer() -> None:
        with tempfile.TemporaryDirectory() as spill:
            budget = 4 * count * positions * SHAPE["hidden_size"]
            streamed(
                checkpoint,
                samples,
                groups(size),
                Measures(),
                torch.device(device),
                budget,
                Path(spill),
            )

    add("score layer by layer", by_layer, first, 2)
    return rows


def rows(tiny: bool) -> list[Row]:
    """All measurements."""
    shape = {**SHAPE, **(TINY if tiny else {})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        model = new_model(shape, seed=0).to(torch.bfloat16)
        save_model(model, folder, stored_config(model, shape))
        del model
        return passes(open_checkpoint(folder), device_of(tiny), tiny)
